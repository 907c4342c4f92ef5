"""The loss of one task as the engines see it, and how a function is applied to every task."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gradagree_opt.core.stacks import PyTree, is_coarse
from gradagree_opt.core.transforms import count_vmaps, without_vmap
from gradagree_opt.engines.kept import no_data_set
from gradagree_opt.engines.normalization import AffineApart
from gradagree_opt.engines.random_state import RandomState, draws_of_each_task
from gradagree_opt.engines.reached import reach
from gradagree_opt.options import check_callable, check_choice, check_count

LossFn = Callable[[PyTree, PyTree], Tensor]
"""``loss_fn(params, batch) -> scalar`` of one task."""

Randomness = Literal["error", "different", "same"]


_DEPENDS: ContextVar[list[bool] | None] = ContextVar("depends", default=None)
"""Of every loss that is computed in a step, whether it depends on the parameters."""


@contextmanager
def some_loss_depends() -> Iterator[None]:
    """Around a step: a ValueError where none of its losses depends on the parameters."""
    depends: list[bool] = []
    token = _DEPENDS.set(depends)
    try:
        yield
    finally:
        _DEPENDS.reset(token)
    if depends and not any(depends):
        refuse_independent()


class ScalarLoss:
    """The loss function, which raises one sentence if its result is no scalar of its parameters.

    A loss that depends on no parameter is refused at once under vmap, where this holds for all
    tasks; elsewhere, one task among others may have a constant loss.

    Raises:
        TypeError: it is no function, or a module that takes its inputs and not its parameters; when
            called, a loss of PyTorch's own on something other than two tensors.
    """

    def __init__(self, loss_fn: LossFn, /) -> None:
        check_callable("loss_fn", loss_fn, "loss_fn(params, batch), which returns a scalar tensor")
        if isinstance(loss_fn, torch.nn.Module) and not takes_two(loss_fn.forward):
            raise TypeError(
                "expected loss_fn to be a function, found a module whose forward takes no (params, "
                f"batch): {type(loss_fn).__name__}; give loss_fn(params, batch), which calls it as "
                "torch.func.functional_call(module, params, …) and returns a scalar tensor"
            )
        self.loss_fn = loss_fn
        self._of_tensors = _is_of_torch_nn(loss_fn)

    def __call__(self, params: PyTree, batch: PyTree, /) -> Tensor:
        """The loss of one task."""
        if self._of_tensors and not (isinstance(params, Tensor) and isinstance(batch, Tensor)):
            name = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
            raise TypeError(
                "expected loss_fn to be a function of (params, batch), found torch.nn's, which "
                f"takes tensors: {name}; give loss_fn(params, batch), which calls the model as "
                "torch.func.functional_call(module, params, …) and then the loss of its outputs"
            )
        with no_data_set():
            loss: object = self.loss_fn(params, batch)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            found = (
                f"a tensor of shape {list(loss.shape)}"
                if isinstance(loss, Tensor)
                else type(loss).__name__
            )
            raise ValueError(
                f"expected loss_fn(params, batch) to return a scalar tensor, found {found}; "
                "reduce it, as in loss.mean()"
            )
        if not loss.is_floating_point():
            raise ValueError(
                "expected loss_fn(params, batch) to return a real floating-point loss, found "
                f"{loss.dtype}; give what is to be minimised, of a complex number its abs()"
            )
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._look_for_graph(params, loss)
        return loss

    def _look_for_graph(self, params: PyTree, loss: Tensor) -> None:
        depends, seen = _has_graph(loss), _DEPENDS.get()
        if not any(map(_has_graph, tree_leaves(params))):
            return
        if not depends and count_vmaps():  # all tasks are run at once
            refuse_independent()
        if seen is not None:
            seen.append(depends)


def takes_two(function: Callable[..., object], /) -> bool:
    """Whether a function can be called with two positional arguments, as far as it says.

    >>> takes_two(lambda x: x), takes_two(lambda x, *others: x)
    (False, True)
    """
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # what is written in C need not say
        return True
    return True


def _is_of_torch_nn(function: Callable[..., object], /) -> bool:
    """Whether it is written in torch.nn, whose modules and functions know no parameters by name."""
    function = getattr(function, "forward", function)
    return getattr(function, "__module__", "").startswith(
        ("torch.nn.modules.", "torch.nn.functional")
    )


def _has_graph(value: object) -> bool:
    """Whether it is a tensor that requires a gradient, seen through the task axes of vmap."""
    return isinstance(value, Tensor) and without_vmap(value).requires_grad


def refuse_independent() -> NoReturn:
    """Raises a ValueError: no task has a gradient."""
    raise ValueError(
        "expected loss_fn(params, batch) to depend on params, found a loss that depends on none of "
        "them, as that of a module called with its own parameters; take "
        "torch.func.functional_call(module, params, …), and no detach() nor no_grad()"
    )


def refuse_coarse(tensors: Sequence[Tensor], /) -> None:
    """Raises a RuntimeError where the tensors' own dtype is too coarse for a sum over tasks."""
    if is_coarse(tensors):
        raise RuntimeError("parameters or losses of less than float32, in which it would add")


def _dense(tensor: Tensor) -> Tensor:
    """The tensor as a dense one: the gradient of a sparse embedding is sparse."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


@dataclass(frozen=True)
class TaskMap:
    """How a function is applied to every task of a batch.

    Args:
        chunk_size: tasks per vmap; None for all at once, 1 for no vmap.
        randomness: of random operations within the tasks, as in ``torch.func.vmap``.
        source: the loss function, or several things that it is made of: what they reach is left as
            it is found, and their generators of random numbers are looked after.

    Raises:
        ValueError: an option is none of its choices.
    """

    chunk_size: int | None = None
    randomness: Randomness = "error"
    source: object = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size, least=1)
        check_choice("randomness", self.randomness, ("error", "different", "same"))

    def walked(self) -> "TaskMap":
        """A copy that has looked up what its source reaches, once for the whole step."""
        return replace(self, source=reach(self.source))

    @property
    def may_draw(self) -> bool:
        """Whether tasks may draw random numbers: without a vmap nothing forbids it."""
        return self.randomness != "error" or self.chunk_size == 1

    def at_once(self, n: int, /) -> int:
        """How many of n tasks are in one vmap."""
        return min(n, self.chunk_size or n)

    def __call__(
        self,
        function: Callable[[PyTree, PyTree], PyTree],
        params: PyTree,
        tasks: PyTree,
        n: int,
        /,
        *,
        differentiated: bool = False,
    ) -> PyTree:
        """``function(params, task)`` of all n tasks, every leaf of the results stacked.

        Args:
            function: of the parameters and one task, without its task axis.
            params: shared by the tasks.
            tasks: task-stacked pytree.
            n: how many they are.
            differentiated: whether a derivative is taken of the result: see :class:`AffineApart`.
        """
        if self.chunk_size == 1:
            each = [function(params, task) for task in self.one_by_one(params, tasks, n)]
            return tree_map(lambda *leaves: torch.stack([_dense(leaf) for leaf in leaves]), *each)
        # With "same", vmap itself repeats its draws in every chunk on a CPU alone (torch 2.14).
        state = self._state(params, tasks) if self.chunk_size is not None else None

        def chunk(params: PyTree, task: PyTree) -> PyTree:
            if state is not None:
                state.restore()
            return function(params, task)

        vmapped = torch.func.vmap(
            chunk, (None, 0), randomness=self.randomness, chunk_size=self.chunk_size
        )
        apart = AffineApart() if differentiated else nullcontext()
        with draws_of_each_task(self.randomness, self.source), apart:
            return vmapped(params, tasks)

    def split(self, tasks: PyTree, n: int, /) -> list[PyTree]:
        """The tasks in task-stacked chunks, one for each vmap."""
        size = self.chunk_size or n
        return [
            tree_map(lambda leaf, at=at: leaf[at : at + size], tasks) for at in range(0, n, size)
        ]

    def one_by_one(self, params: PyTree, tasks: PyTree, n: int, /) -> Iterator[PyTree]:
        """Every task without its task axis, under the random numbers that ``randomness`` says."""
        state = self._state(params, tasks)
        for index in range(n):
            if state is not None:
                state.restore()
            yield tree_map(lambda leaf, i=index: leaf[i], tasks)

    def _state(self, params: PyTree, tasks: PyTree) -> RandomState | None:
        """The random numbers that all tasks are to draw; None if each draws its own."""
        if self.randomness != "same":
            return None
        return RandomState(params, tasks, source=self.source)


Function = Callable[[PyTree, PyTree], tuple[Tensor, tuple[PyTree, Tensor]]]


@dataclass(frozen=True)
class TaskLoss:
    """The loss of one task and the signal that agreement is measured on.

    Args:
        function: ``(params, task) -> (loss, (signal, loss))``, the second two constants of
            differentiation; the signal is an empty tuple where it is the gradient of the loss.
        signal_is_gradient: whether it is.
        map: applies a function to every task.
        adapts: whether every task has parameters of its own, so that n · d numbers are held anyway.
        first_order: the function without second derivatives, where it has some.
        plain_loss: ``(params, task) -> loss`` without adaptation, as a loop would differentiate.
    """

    function: Function
    signal_is_gradient: bool = True
    map: TaskMap = field(default_factory=TaskMap)
    adapts: bool = False
    first_order: Function | None = None
    plain_loss: LossFn | None = None

    def walked(self) -> "TaskLoss":
        """A copy whose map is :meth:`TaskMap.walked`."""
        return replace(self, map=self.map.walked())

    @classmethod
    def plain(cls, loss_fn: LossFn, map: TaskMap) -> "TaskLoss":
        """A loss function whose gradient is the signal."""
        checked = ScalarLoss(loss_fn)

        def function(params: PyTree, task: PyTree) -> tuple[Tensor, tuple[PyTree, Tensor]]:
            loss = checked(params, task)
            return loss, ((), loss.detach())

        return cls(function, map=map, plain_loss=checked)
