"""TaskOptimizer: an optimizer that steps on a vector of task losses."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.results import CollectedTasks
from gradagree_opt.loops.loss_vector import Losses, loss_vector, weighted_loss
from gradagree_opt.loops.task_batch import TaskBatch


class FunctionalStep(NamedTuple):
    """The parameters after a step that left the ones before as they were, and its aggregation."""

    params: tuple[Tensor, ...]
    aggregation: CollectedTasks


class TaskOptimizer:
    """Wraps an optimizer: ``step(losses)`` aggregates the gradients of n task losses, then steps.

    Everything else (``zero_grad``, ``state_dict``, ``param_groups``) is the wrapped optimizer's;
    a learning-rate scheduler is given that one. A GradScaler could not undo its scale before the
    step: take a :class:`gradagree_opt.TaskBatch` there. What it steps on is what it always does:

    - ``torch.optim.Optimizer`` and ``torchopt.Optimizer`` on ``.grad``; as with ``backward``, the
      update is added to a ``.grad`` that is already there.
    - ``torchopt.MetaOptimizer`` on the loss Σ_i w_i L_i, the weights constants, so that the step
      is differentiable as its steps are; one more backward pass.
    - ``torchopt.FuncOptimizer``, which holds no parameters, on the same loss in
      ``functional_step(losses, params)``.

    Args:
        optimizer: the optimizer.
        aggregator: what weights the tasks; signal and direction are both the loss gradient.
        module: whose names a ``scope`` that is a function sees. Without it, those that the
            optimizer was built with, as by ``Adam(model.named_parameters())``.

    Raises:
        TypeError: the optimizer is none of these, or needs a closure; or the aggregator is none.
        ValueError: the optimizer steps on a loss, and the aggregator's scope is not "global", or it
            gives no weights; or a function is its scope, and a parameter has no name.

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
        # The attributes that tell TorchOpt's three kinds apart, without importing it.
        self._functional = hasattr(optimizer, "optim_state")
        self._differentiable = hasattr(optimizer, "param_containers_groups")
        on_loss = self._functional or self._differentiable
        if not on_loss:
            check_optimizer(optimizer)
        if on_loss and aggregator.scope != "global":
            raise ValueError(
                f"expected an aggregator of scope 'global' for {type(optimizer).__name__}, found "
                f"{aggregator.scope!r}: it steps on one loss, which has one weight a task"
            )
        if on_loss and "directions" in aggregator.needs:
            raise ValueError(
                f"expected an aggregator that gives one weight a task for "
                f"{type(optimizer).__name__}, which steps on one loss, found one whose update is "
                "no weighted sum; wrap an optimizer that steps on .grad, as torchopt.Optimizer"
            )
        self.optimizer = optimizer
        self.aggregator = aggregator
        self.module = module
        if not on_loss:
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
            TypeError: the wrapped optimizer holds no parameters, or ``losses`` is a closure.
            ValueError: ``losses`` is not a vector or is empty, or the aggregator refuses the
                gradients or drops all of them. No parameter, ``.grad`` or optimizer state is
                touched then.
        """
        with self.aggregator.step_of_ranks():
            return self._step(losses)

    def _step(self, losses: Losses | None) -> CollectedTasks:
        if losses is None:
            raise TypeError(
                "expected the task losses, found none; a GradScaler, and what else calls step() by "
                "itself, is given the wrapped optimizer, with TaskBatch for the losses"
            )
        if self._functional:
            raise TypeError(
                f"expected an optimizer that holds its parameters, found "
                f"{type(self.optimizer).__name__}; call functional_step(losses, params)"
            )
        if self._differentiable:
            loss, result = weighted_loss(losses, self._parameters(), self.aggregator)
            self.optimizer.step(loss)
            return result
        batch = TaskBatch(self._named_parameters(), self.aggregator)
        for loss in loss_vector(losses, least=self.aggregator.fewest):
            batch.add(loss)
        result = batch.backward()
        self.optimizer.step()
        return result

    def functional_step(self, losses: Losses, params: tuple[Tensor, ...], /) -> FunctionalStep:
        """:meth:`step` of a ``torchopt.FuncOptimizer``: returns new parameters.

        Args:
            losses: ``[n]`` tensor or sequence of n scalars, one loss a task.
            params: tuple of the parameters that the losses depend on.

        Raises:
            TypeError: the wrapped optimizer holds its parameters, or ``params`` is no tuple.
            ValueError: as :meth:`step`.
        """
        if not self._functional:
            raise TypeError(
                f"expected a torchopt.FuncOptimizer, found {type(self.optimizer).__name__}, which "
                "holds its parameters; call step(losses)"
            )
        if not isinstance(params, tuple):
            raise TypeError(
                f"expected a tuple of parameters, which is what torchopt.FuncOptimizer takes, "
                f"found {type(params).__name__}; give tuple(params)"
            )
        loss, result = weighted_loss(losses, params, self.aggregator)
        return FunctionalStep(self.optimizer.step(loss, params), result)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears ``.grad`` of the wrapped optimizer's parameters, unless it uses none."""
        if not (self._functional or self._differentiable):
            self.optimizer.zero_grad(set_to_none)

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

    def _named_parameters(self) -> dict[str, Tensor] | list[Tensor]:
        """The parameters by name, or in order where they have none of their own."""
        names: dict[int, str] = {}
        for group in self.param_groups:
            if isinstance(group, dict):
                given = zip(group["params"], group.get("param_names", ()), strict=False)
                names.update((id(parameter), name) for parameter, name in given)
        if self.module is not None:
            names.update((id(p), name) for name, p in self.module.named_parameters())
        parameters = self._parameters()
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

    def _parameters(self) -> list[Tensor]:
        if self._differentiable:
            groups = self.optimizer.param_containers_groups
        else:
            groups = [g["params"] if isinstance(g, dict) else g for g in self.param_groups]
        return [leaf for leaf in tree_leaves(groups) if leaf is not None]


def check_optimizer(optimizer: Any, /) -> None:
    """Raises a TypeError unless it is an optimizer that steps on ``.grad`` without a closure."""
    if not (hasattr(optimizer, "step") and hasattr(optimizer, "param_groups")):
        raise TypeError(
            f"expected an optimizer with param_groups and step(), found "
            f"{type(optimizer).__name__}; give one as torch.optim.SGD(model.parameters(), …)"
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
                "torch.optim.SGD(model.parameters(), …)"
            )
