"""The engine for a signal known from the forward pass: one backward pass of the weighted loss."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.few_passes import weighted_loss_refusal
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.shards import of_no_task
from gradagree_opt.core.stacks import PyTree, task_count
from gradagree_opt.engines.losses import TaskLoss, refuse_coarse


def one_backward_refusal(aggregator: Aggregator, task_loss: TaskLoss, /) -> str | None:
    """Why the engine cannot serve an aggregator, in half a sentence; None where it can."""
    if task_loss.signal_is_gradient:
        return "its signal is the gradient, which no forward pass tells"
    return weighted_loss_refusal(aggregator)


def one_backward(
    task_loss: TaskLoss,
    params: PyTree,
    tasks: PyTree,
    aggregator: Aggregator,
    /,
) -> tuple[Aggregation, Float[Tensor, " n"]]:
    """Aggregation of the gradients by their tasks' own signals, and the losses.

    Extra memory: the n signals and the graphs of n tasks, but no gradient of a task.

    Raises:
        RuntimeError: the parameters or the losses have less than the precision of float32.
    """
    n = task_count(tasks, "tasks")
    refuse_coarse(tree_leaves(params))

    def losses_of(params: PyTree) -> tuple[Tensor, PyTree]:
        losses, (signal, _) = task_loss.map(
            task_loss.function, params, tasks, n, differentiated=True
        )
        return losses, signal

    losses, backward, signal = _vjp(losses_of, params)
    refuse_coarse([losses])

    def weighted(weights: Tensor, groups: list[int] | None) -> PyTree:
        if groups is None:
            return backward(weights.to(losses.dtype))[0]
        each = [tree_leaves(backward(row.to(losses.dtype))[0]) for row in weights]
        update = [each[group][index] for index, group in enumerate(groups)]
        return tree_unflatten(update, tree_structure(params))

    measured = aggregator.measure(
        signal, directions=of_no_task(params), nonfinite=~torch.isfinite(losses)
    )
    return aggregator.apply(measured, weighted), losses


def _vjp(
    function: Callable[[PyTree], tuple[Tensor, PyTree]], params: PyTree
) -> tuple[Tensor, Callable[[Tensor], tuple[PyTree]], PyTree]:
    """torch.func.vjp with an auxiliary output, whose type depends on it."""
    return torch.func.vjp(function, params, has_aux=True)  # type: ignore[return-value]
