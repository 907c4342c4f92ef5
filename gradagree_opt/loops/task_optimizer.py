"""TaskOptimizer: an optimizer that steps on a vector of task losses."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.diagnostics import check_some_task
from gradagree_opt.core.results import CollectedTasks
from gradagree_opt.loops.graphs import check_depends, check_loss
from gradagree_opt.loops.loss_graph import LossGraph
from gradagree_opt.loops.multi_task import aggregate_losses
from gradagree_opt.loops.task_batch import TaskBatch
from gradagree_opt.one_process import check_one_process

Losses = Float[Tensor, " n"] | Sequence[Tensor]


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
        for loss in _vector(losses, least=self.aggregator.fewest):
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


def weighted_loss(
    losses: Losses, parameters: Sequence[Tensor], aggregator: Aggregator, /
) -> tuple[Float[Tensor, ""], CollectedTasks]:
    """Σ_i w_i L_i, whose gradient is the aggregation of the task gradients, and that aggregation.

    The weights are constants, the losses keep their graphs. Tasks that the aggregator drops are
    left out.

    Raises:
        ValueError: a parameter is frozen, a loss does not depend on the parameters, no task is
            left, or the aggregator refuses the gradients.
    """
    losses = _vector(losses)
    if aggregator.ranks is not None:
        raise ValueError(
            "expected an aggregator of one process, found one of several ranks, whose weighted "
            "loss no rank has; take an optimizer of torch.optim, or torchopt's that holds its "
            "parameters, with TaskBatch for the losses"
        )
    check_one_process(parameters)
    for position, parameter in enumerate(parameters):
        if not parameter.requires_grad:
            raise ValueError(
                f"expected parameters that require a gradient, found number {position}, of shape "
                f"{list(parameter.shape)}, frozen, by which TorchOpt would differentiate; leave it "
                "out of what the optimizer is given"
            )
    for task, loss in enumerate(losses):
        check_depends(loss, parameters, task, advice="compute it from those of the optimizer")
    values = torch.stack([loss.detach() for loss in losses])
    by_position = {str(position): parameter for position, parameter in enumerate(parameters)}
    graph = LossGraph(losses, by_position, kept=True)
    nonfinite = ~torch.isfinite(values)
    result = aggregate_losses(graph, nonfinite, aggregator)
    if result is None:
        each = [graph.gradient(task, retain_graph=True) for task in range(len(losses))]
        stack = {name: torch.stack([task[name] for task in each]) for name in by_position}
        result = aggregator.aggregate_unchecked(stack, nonfinite=nonfinite)
    aggregator.verify(result)
    check_some_task(result.diagnostics, aggregator.nonfinite)
    result = result._replace(update=[*result.update.values()])
    terms = [weight * loss for weight, loss in zip(result.weights, losses, strict=True)]
    if aggregator.nonfinite == "drop":
        # A dropped task must not reach the shared backward pass: 0 · NaN is NaN there.
        dropped = result.diagnostics.nonfinite.tolist()
        terms = [term for term, out in zip(terms, dropped, strict=True) if not out]
    return torch.stack(terms).sum(), CollectedTasks(*result, values)


def _vector(losses: Losses, *, least: int = 1) -> list[Tensor]:
    if isinstance(losses, Tensor) and losses.ndim != 1:
        raise ValueError(
            f"expected a vector of task losses [n], found shape {list(losses.shape)}; "
            "give one loss a task, not their mean"
        )
    if isinstance(losses, Mapping):
        raise TypeError(
            f"expected a sequence of task losses, found {type(losses).__name__}; give "
            "list(losses.values())"
        )
    if not isinstance(losses, Iterable):
        raise TypeError(
            f"expected the task losses [n], found {type(losses).__name__}; compute them before the "
            "step, and give them in place of a closure"
        )
    each = list(losses.unbind()) if isinstance(losses, Tensor) else list(losses)
    if len(each) < least:
        raise ValueError(
            "expected at least one task, found no losses; skip the step when there are no tasks"
        )
    for task, loss in enumerate(each):
        check_loss(loss, task)
    return each
