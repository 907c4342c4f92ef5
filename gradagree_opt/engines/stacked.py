"""The stacked engine: per-task gradients as one vmapped backward pass, then an aggregation."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradagree_opt.annotations import Float
from gradagree_opt.batchnorm import statistics_refused
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.stacks import PyTree, check_floating, task_count
from gradagree_opt.engines.cures import Cure, explaining, few, of_a_loop, of_the_map, one_of
from gradagree_opt.engines.kept import left_as_found
from gradagree_opt.engines.losses import (
    LossFn,
    Randomness,
    ScalarLoss,
    TaskLoss,
    TaskMap,
    some_loss_depends,
)
from gradagree_opt.engines.meant import naming_what_was_meant
from gradagree_opt.one_process import check_whole


class TaskGradients(NamedTuple):
    """Gradients of n tasks, like the parameters with leaves ``[n, *shape]``, and their losses."""

    gradients: PyTree
    losses: Float[Tensor, " n"]


def task_gradients(
    loss_fn: LossFn,
    params: PyTree,
    tasks: PyTree,
    /,
    *,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> TaskGradients:
    """Gradient and loss of every task: vmap(grad) over the task axis.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` of one task; an nn.Module enters through
            ``torch.func.functional_call``.
        params: pytree of floating-point tensors, shared by the tasks.
        tasks: the batch of every task, a pytree with leaves ``[n, *shape]``.
        chunk_size: tasks per vmap, which bounds the memory; None for all at once, 1 for no vmap.
        randomness: of dropout and the like: "error" refuses it under vmap, "different" and "same"
            draw for each task or once for all, as in ``torch.func.vmap``.

    Returns:
        ``gradients`` (leaves ``[n, *shape]``) and ``losses`` ``[n]``, differentiable in what
        requires a gradient, as torch.func.grad is: ``detach()`` the parameters to save that graph.

    Raises:
        ValueError: the task axes differ or are empty, the tasks are a list of them, or of integers
            where the loss wants floats; the loss is no real scalar or depends on no parameter, the
            model changes its buffers, or a parameter lies in parts on several ranks.
        TypeError: a parameter is not a floating-point tensor.
        RuntimeError: vmap(grad) cannot run the model, or memory does not suffice.

    >>> import gradagree_opt as ga
    >>> loss_fn = lambda w, x: ((w * x) ** 2).mean()
    >>> ga.task_gradients(loss_fn, torch.tensor(1.0), torch.tensor([[1.0], [2.0]]))
    TaskGradients(gradients=tensor([2., 8.]), losses=tensor([1., 4.]))
    """
    check_floating(params, "parameters")
    check_whole(tree_leaves(params))
    n = task_count(tasks, "tasks")
    gradient_and_loss = torch.func.grad_and_value(ScalarLoss(loss_fn))
    each = TaskMap(chunk_size, randomness, loss_fn).walked()
    without = "ga.aggregate_gradients(…, engine='streamed')"

    def run(each: TaskMap, tasks: PyTree) -> TaskGradients:
        n = task_count(tasks, "tasks")
        with some_loss_depends(), statistics_refused(), left_as_found(each.source):
            return TaskGradients(*each(gradient_and_loss, params, tasks, n, differentiated=True))

    def cures() -> Iterator[Cure]:
        yield from of_the_map(each, lambda other: run(other, few(tasks)))
        yield of_a_loop(loss_fn, params, one_of(tasks), without)

    with (
        naming_what_was_meant(loss_fn, params, tasks, loss_fn),
        explaining("vmap(grad)", each.at_once(n), each.source, cures, without=without),
    ):
        return run(each, tasks)


def stacked(
    task_loss: TaskLoss,
    params: PyTree,
    tasks: PyTree,
    aggregator: Aggregator,
    /,
) -> tuple[Aggregation, Float[Tensor, " n"]]:
    """Aggregation of n gradients that are held at once, and the losses: n · d extra memory."""
    n = task_count(tasks, "tasks")
    gradient = torch.func.grad(task_loss.function, has_aux=True)
    gradients, (signal, losses) = task_loss.map(gradient, params, tasks, n)
    aggregation = aggregator.aggregate_unchecked(
        gradients,
        signal if tree_leaves(signal) else None,
        nonfinite=~torch.isfinite(losses),
    )
    return aggregation, losses
