"""TorchOpt: any functional optimizer as an inner loop, agreement in a chain and in a loss.

Loops over a Meta-optimizer, and optimizers that step on ``.grad``, need nothing from here:
:class:`gradagree_opt.TaskBatch` and :class:`gradagree_opt.TaskOptimizer` take them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.diagnostics import Diagnostics
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.engines import LossFn
from gradagree_opt.frameworks import require
from gradagree_opt.options import check_count

require("torchopt")

import torchopt  # noqa: E402 - after require, whose error names the install command
from gradagree_opt.adapters.torchopt_loss import weighted_loss  # noqa: E402 - likewise
from torchopt import pytree  # noqa: E402
from torchopt.base import GradientTransformation  # noqa: E402

__all__ = ["AggregateState", "Inner", "aggregate", "inner", "weighted_loss"]


class AggregateState(NamedTuple):
    """State of :func:`aggregate`.

    Attributes:
        shapes: of the parameters, in order.
        weights: of the tasks in the last update; None before the first.
        diagnostics: of the last update; None before the first.
    """

    shapes: tuple[torch.Size, ...]
    weights: Float[Tensor, "*groups n"] | None = None
    diagnostics: Diagnostics | None = None


def aggregate(aggregator: Aggregator, /) -> GradientTransformation:
    """From task-stacked gradients to their aggregation; first in ``torchopt.chain(…)``.

    What ``update`` is given has one more axis than the parameters, the task first, as
    :func:`gradagree_opt.task_gradients` gives it; what follows in the chain sees one update.
    A leaf that is None stays None. Nothing is changed in place, whatever ``inplace`` says.

    Args:
        aggregator: what weights the tasks.

    Raises:
        TypeError: ``aggregator`` is no aggregator.
        ValueError: in ``init``, where another transformation comes before it in a chain, or a mask
            leaves parameters out; in ``update``, where the leaves are no stack of the parameters'
            shapes, or the aggregator refuses the gradients.

    >>> import gradagree_opt as ga
    >>> optimizer = torchopt.chain(aggregate(ga.GradientAgreement()), torchopt.sgd(lr=0.1))
    >>> params = {"w": torch.zeros(2)}
    >>> state = optimizer.init(params)
    >>> gradients = {"w": torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -1.0]])}
    >>> updates, state = optimizer.update(gradients, state, params=params)
    >>> updates
    {'w': tensor([-0.1667, -0.0333])}
    >>> state[0].weights
    tensor([0.6667, 0.3333, 0.0000])
    """
    check_aggregator(aggregator)

    def init(params: PyTree) -> AggregateState:
        _check_first()
        _check_unmasked(params)
        leaves = pytree.tree_leaves(params, none_is_leaf=True)
        return AggregateState(tuple(torch.Size(getattr(leaf, "shape", ())) for leaf in leaves))

    def update(
        updates: PyTree,
        state: AggregateState,
        *,
        params: PyTree | None = None,  # noqa: ARG001 - the protocol's; the state has their shapes
        inplace: bool = True,  # noqa: ARG001
    ) -> tuple[PyTree, AggregateState]:
        paths = pytree.tree_paths(updates, none_is_leaf=True)
        leaves, structure = pytree.tree_flatten(updates, none_is_leaf=True)
        names = [".".join(map(str, path)) for path in paths]
        _check_stacked(names, leaves, state.shapes)
        stack = {n: leaf for n, leaf in zip(names, leaves, strict=True) if leaf is not None}
        result = aggregator.aggregate(stack)
        aggregated = pytree.tree_unflatten(structure, map(result.update.get, names))
        diagnostics = Diagnostics(*result.diagnostics)  # a plain tuple, which optree looks into
        return aggregated, AggregateState(state.shapes, result.weights, diagnostics)

    return GradientTransformation(init, update)


def inner(transformation: GradientTransformation, steps: int) -> "Inner":
    """Any functional optimizer of TorchOpt in the place of :class:`gradagree_opt.InnerSGD`.

    Its state is made anew for every task, and second order goes through it. Where an entry's
    gradient can be zero, the derivative of a square root is NaN: ``adam`` and ``adamw`` have
    ``eps_root`` against it, ``rmsprop``, ``adagrad`` and ``radam`` want ``first_order=True``.

    Args:
        transformation: as ``torchopt.adam(lr=0.01)``, or a ``torchopt.chain(…)``.
        steps: inner steps, each on the whole support set.

    Raises:
        TypeError: ``transformation`` is no GradientTransformation.
        ValueError: ``steps`` is negative; while adapting, the transformation cannot run under vmap
            (``use_accelerated_op=True``, ``clip_grad_norm``).

    >>> import gradagree_opt as ga
    >>> loss_fn = lambda w, x: ((w - x) ** 2).mean()
    >>> maml = ga.MAML(loss_fn, inner(torchopt.sgd(lr=0.25, momentum=0.9), steps=1))
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> maml.step(torch.tensor(0.0), {"support": x, "query": x}, ga.Mean()).update
    tensor(-1.)
    """
    if not isinstance(transformation, GradientTransformation):
        raise TypeError(
            f"expected a functional optimizer, found {type(transformation).__name__}; give what "
            "torchopt.adam(lr=…) and its like return"
        )
    check_count("steps", steps)
    return Inner(transformation, steps, tuple(_first_calls(transformation.update)))


@dataclass(frozen=True)
class Inner:
    """The inner loop that :func:`inner` makes: from parameters to θ_i of one task."""

    transformation: GradientTransformation
    steps: int
    first_calls: tuple[CellType, ...] = ()

    def __call__(
        self,
        loss_fn: LossFn,
        params: PyTree,
        support: PyTree,
        /,
        *,
        first_order: bool = False,
        steps: int | None = None,
    ) -> PyTree:
        """Adapted parameters of one task; ``steps`` in place of the loop's own number."""
        state = _batched_like(support, self.transformation.init(params))
        if self.first_calls and torch.compiler.is_compiling():
            raise ValueError(
                "expected a momentum without dampening under torch.compile, found one with it, "
                "which TorchOpt keeps outside of its state; give compile=False"
            )
        for cell in self.first_calls:
            cell.cell_contents = True
        gradient = torch.func.grad(loss_fn)
        for _ in range(self.steps if steps is None else check_count("steps", steps)):
            at = tree_map(torch.Tensor.detach, params) if first_order else params
            updates, state = self._update(gradient(at, support), state, at)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return params

    def _update(self, grads: PyTree, state: Any, params: PyTree) -> tuple[PyTree, Any]:
        try:
            with _WrittenOut():
                return self.transformation.update(grads, state, params=params, inplace=False)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise ValueError(
                "expected a transformation that runs under vmap, found one that does not; leave "
                "out use_accelerated_op=True and transformations that read their tensors, as "
                "clip_grad_norm"
            ) from error


def _batched_like(support: PyTree, state: Any) -> Any:
    """The state with the task axes of the support set.

    TorchOpt adds gradients to the state in place, and under vmap only a tensor that has the task
    axis already can take them.
    """
    zero = sum(leaf.new_zeros((), dtype=torch.float32) for leaf in tree_leaves(support))

    def batched(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf + zero.to(leaf.dtype)
        return leaf

    return tree_map(batched, state)


def _first_calls(update: Callable[..., Any]) -> Iterator[CellType]:
    """The cells in which momentum with dampening notes its first call, which is not dampened.

    TorchOpt 0.7.3 keeps them outside of its state, so a state made anew does not reset them.
    """
    pending: list[Any] = [update]
    seen: set[FunctionType] = set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        held = {}
        for name, cell in cells.items():
            with suppress(ValueError):  # empty
                held[name] = cell.cell_contents
        if held.get("dampening") and "first_call" in held:
            yield cells["first_call"]
        for value in held.values():
            each = value if isinstance(value, tuple | list) else [value]
            pending += [getattr(one, "update", one) for one in each]


class _WrittenOut(TorchFunctionMode):
    """addcmul_ as two operations: vmap has no rule for it and would run the tasks one by one."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.addcmul_:
            total, first, second = args
            return total.add_(first * second, alpha=kwargs.get("value", 1))
        return func(*args, **kwargs)


def _check_first() -> None:
    """Raises a ValueError where a chain has called the ``init`` of another transformation first.

    That one would be given the stack, and most fail on it. TorchOpt does not tell a transformation
    its place in a chain, so it is read from the frames that call ``init``.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_back
        chained = caller.f_locals.get("init_fns") if caller is not None else None
        if chained and chained[0] is not frame.f_locals.get("fn", chained[0]):
            raise ValueError(
                "expected aggregate(…) first in its chain, found it in place "
                f"{chained.index(frame.f_locals['fn']) + 1}, where those before it would be given "
                "the stack of gradients; put it first in torchopt.chain(…)"
            )
        frame = caller


def _check_unmasked(params: PyTree) -> None:
    """Raises a ValueError inside ``masked``, which hands on the stacks that it leaves out."""

    def is_masked(node: object) -> bool:  # TorchOpt does not export the class
        return type(node).__name__ == "MaskedNode"

    if any(map(is_masked, pytree.tree_leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "expected aggregate(…) of all parameters, found it in a mask, past which the others' "
            "stacks would go; put it first in torchopt.chain(…), and mask what follows"
        )


def _check_stacked(
    names: list[str], leaves: list[Tensor | None], shapes: tuple[torch.Size, ...]
) -> None:
    if len(leaves) != len(shapes):
        raise ValueError(
            f"expected updates for the {len(shapes)} parameters that init was given, found "
            f"{len(leaves)}; init and update need the same pytree"
        )
    for name, leaf, shape in zip(names, leaves, shapes, strict=True):
        if leaf is not None and (leaf.ndim == 0 or leaf.shape[1:] != shape):
            raise ValueError(
                f"expected task-stacked updates, the task axis before the parameter's "
                f"{list(shape)}, found {list(leaf.shape)} in {name!r}; give init() the parameters "
                "and update() one gradient a task, as ga.task_gradients does"
            )
