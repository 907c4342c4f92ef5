"""A vector of task losses: looked at, and as the one loss whose gradient is the aggregation."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.diagnostics import check_some_task
from gradagree_opt.core.results import CollectedTasks
from gradagree_opt.loops.graphs import check_depends, check_loss
from gradagree_opt.loops.loss_graph import LossGraph
from gradagree_opt.loops.multi_task import aggregate_losses
from gradagree_opt.one_process import check_one_process

Losses = Float[Tensor, " n"] | Sequence[Tensor]


def loss_vector(losses: Losses, /, *, least: int = 1) -> list[Tensor]:
    """The losses of n tasks, each looked at.

    Args:
        losses: ``[n]`` tensor, or iterable of n scalars.
        least: how many there have to be.

    Raises:
        TypeError, ValueError: they are no vector, fewer, or one is no real scalar with a graph.
    """
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
    losses = loss_vector(losses)
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
