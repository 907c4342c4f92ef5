"""TaskOptimizer: an optimizer that steps on a vector of task losses."""

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.results import CollectedTasks
from gradagree_opt.loops.loss_vector import Losses, loss_vector
from gradagree_opt.loops.task_batch import TaskBatch
from gradagree_opt.one_process import reshard


class TaskOptimizer:
    """Wraps an optimizer: ``step(losses)`` aggregates the gradients of n task losses, then steps.

    All else is the wrapped optimizer's: ``zero_grad``, ``state_dict``, ``param_groups``, and the
    ``train`` and ``eval`` of schedule-free ones. Give that one to a learning-rate scheduler. A
    GradScaler could not undo its scale before the step: take a :class:`gradagree_opt.TaskBatch`
    with it. As with ``backward``, the update is added to a ``.grad`` that is already there.

    Args:
        optimizer: one that steps on ``.grad``, as those of torch.optim and ``torchopt.Optimizer``.
        aggregator: what weights the tasks; signal and direction are both the loss gradient.
        module: whose names a ``scope`` that is a function sees. Without it, those that the
            optimizer was built with, as by ``Adam(model.named_parameters())``.

    Raises:
        TypeError: the optimizer does not step on ``.grad``, or needs a closure; or the aggregator
            is none.
        ValueError: a function is the aggregator's scope, and a parameter has no name.

    >>> import gradagree_opt as ga
    >>> w = torch.tensor([0.0], requires_grad=True)
    >>> optimizer = ga.TaskOptimizer(torch.optim.SGD([w], lr=0.1), ga.GradientAgreement())
    >>> optimizer.zero_grad()
    >>> result = optimizer.step((w - torch.tensor([1.0, 2.0, 3.0])) ** 2)
    >>> w
    tensor([0.4667], requires_grad=True)
    """

    def __init__(
        self, optimizer: Any, /, aggregator: Aggregator, *, module: nn.Module | None = None
    ) -> None:
        check_aggregator(aggregator)
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.aggregator = aggregator
        self.module = module
        self._named_parameters()

    def step(self, losses: Losses | None = None, /) -> CollectedTasks:
        """Aggregates the gradients of the task losses and steps the wrapped optimizer.

        Args:
            losses: ``[n]`` tensor or sequence of n scalars, one loss a task. Where the aggregator
                is to drop a task that is not finite, a sequence: in the gradient of one tensor
                its NaN reaches the others.

        Returns:
            The aggregation and the losses, its update by name of the parameter, or by position
            without names.

        Raises:
            TypeError: ``losses`` is a closure, or there are none.
            ValueError: ``losses`` is not a vector or is empty, or the aggregator refuses the
                gradients or drops all of them. No parameter, ``.grad`` or optimizer state is
                touched then.
        """
        with self.aggregator.step_of_ranks():
            if losses is None:
                raise TypeError(
                    "expected the task losses, found none; a GradScaler, and what else calls "
                    "step() by itself, is given the wrapped optimizer, with TaskBatch for the "
                    "losses"
                )
            batch = TaskBatch(self._named_parameters(), self.aggregator)
            for loss in loss_vector(losses, least=self.aggregator.fewest):
                batch.add(loss)
            result = batch.backward()
            self.optimizer.step()
            return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears ``.grad`` of the wrapped optimizer's parameters."""
        if inspect.signature(self.optimizer.zero_grad).parameters:
            self.optimizer.zero_grad(set_to_none)
        else:  # of wrappers by hand, as Lookahead
            self.optimizer.zero_grad()

    def state_dict(self) -> Any:
        """State of the wrapped optimizer: a dict, or what TorchOpt has in its place."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any, /) -> None:
        """Loads the state of the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    @property
    def param_groups(self) -> list[Any]:
        """Parameter groups of the wrapped optimizer."""
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    @property
    def state(self) -> NoReturn:
        """None of its own: Lightning asks for it where the wrapped optimizer is to be given.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "expected an optimizer that is stepped without losses, as by Lightning, found "
            "TaskOptimizer; return the wrapped one from configure_optimizers, and give the tasks "
            "to AgreementCallback or ManualTaskBatch"
        )

    defaults = state

    def __getattr__(self, name: str) -> Any:
        """What else the wrapped optimizer has: ``train``, ``eval``, ``add_param_group``, hooks."""
        if name.startswith("_") or name == "optimizer":  # what a GradScaler or copy looks for
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def _named_parameters(self) -> dict[str, Tensor] | list[Tensor]:
        """The parameters by name, or in order where they have none of their own."""
        names: dict[int, str] = {}
        for group in self.param_groups:
            if isinstance(group, dict):
                given = zip(group["params"], group.get("param_names", ()), strict=False)
                names.update((id(parameter), name) for parameter, name in given)
        if self.module is not None:
            reshard(self.module)
            names.update((id(p), name) for name, p in self.module.named_parameters())
        groups = [g["params"] if isinstance(g, dict) else g for g in self.param_groups]
        parameters = [leaf for leaf in tree_leaves(groups) if leaf is not None]
        unnamed = [at for at, parameter in enumerate(parameters) if id(parameter) not in names]
        named = {names.get(id(parameter), ""): parameter for parameter in parameters}
        if not unnamed and len(named) == len(parameters):
            return named
        if callable(self.aggregator.scope):
            # Groups of two modules may have one name for two parameters.
            found = f"none for parameter number {unnamed[0]}" if unnamed else "one name twice"
            raise ValueError(
                f"expected names for a scope that is a function, found {found}; give "
                "TaskOptimizer(optimizer, aggregator, module=model), or build the optimizer with "
                "model.named_parameters()"
            )
        return parameters


_UNWRAPPED = ", or leave it unwrapped, and fill .grad by a TaskBatch"


def check_optimizer(optimizer: Any, /) -> None:
    """Raises a TypeError unless it is an optimizer that steps on ``.grad`` without a closure."""
    if not (hasattr(optimizer, "step") and hasattr(optimizer, "param_groups")):
        found = type(optimizer).__name__
        # What tells TorchOpt's other kinds, without importing it.
        if hasattr(optimizer, "optim_state") or hasattr(optimizer, "param_containers_groups"):
            raise TypeError(
                f"expected an optimizer that steps on .grad, found {found}, which steps on a loss; "
                "give its step() that of gradagree_opt.adapters.torchopt.weighted_loss"
            )
        other = _UNWRAPPED if hasattr(optimizer, "step") else ""
        raise TypeError(
            f"expected an optimizer with param_groups and step(), found {found}; give one as "
            f"torch.optim.SGD(model.parameters(), …){other}"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError(
            "expected an optimizer of dense gradients, found SparseAdam; take Adam or SGD, as an "
            "update is dense, that of a sparse embedding too"
        )
    for name, parameter in inspect.signature(optimizer.step).parameters.items():
        optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        # Where a scheduler has wrapped step, self is among its parameters.
        needed = parameter.default is parameter.empty or isinstance(optimizer, TaskOptimizer)
        if needed and not optional and name != "self":
            raise TypeError(
                f"expected an optimizer that steps on .grad alone, found "
                f"{type(optimizer).__name__}, whose step() needs its {name}; give one as "
                f"torch.optim.SGD(model.parameters(), …){_UNWRAPPED}, in its closure if it takes "
                "one"
            )
