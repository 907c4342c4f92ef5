"""The stacked engine: per-task gradients as one vmapped backward pass, then an aggregation."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.annotations import Float
from gradagree_opt.stacks import PyTree, check_floating, task_count

LossFn = Callable[[PyTree, PyTree], Tensor]
"""``loss_fn(params, batch) -> scalar`` of one task."""


class TaskGradients(NamedTuple):
    """Gradients of n tasks, like the parameters with leaves ``[n, *shape]``, and their losses."""

    gradients: PyTree
    losses: Float[Tensor, " n"]


def scalar_loss(loss_fn: LossFn, /) -> LossFn:
    """The loss function, which answers anything but a scalar with one sentence."""

    def checked(params: PyTree, batch: PyTree) -> Tensor:
        loss: object = loss_fn(params, batch)
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
        return loss

    return checked


def task_gradients(
    loss_fn: LossFn, params: PyTree, tasks: PyTree, /, *, chunk_size: int | None = None
) -> TaskGradients:
    """Gradient and loss of every task: vmap(grad) over the task axis.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` of one task; an nn.Module enters through
            ``torch.func.functional_call``.
        params: pytree of floating-point tensors, shared by the tasks.
        tasks: the batch of every task, a pytree with leaves ``[n, *shape]``.
        chunk_size: tasks per vmap, which bounds the memory; None for all at once, 1 for no vmap.

    Returns:
        ``gradients`` (leaves ``[n, *shape]``) and ``losses`` ``[n]``.

    Raises:
        ValueError: the task axes differ or are empty, or the loss is not a scalar.
        TypeError: a parameter is not a floating-point tensor.

    >>> import gradagree_opt as ga
    >>> loss_fn = lambda w, x: ((w * x) ** 2).mean()
    >>> ga.task_gradients(loss_fn, torch.tensor(1.0), torch.tensor([[1.0], [2.0]]))
    TaskGradients(gradients=tensor([2., 8.]), losses=tensor([1., 4.]))
    """
    check_floating(params, "parameters")
    n = task_count(tasks, "tasks")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"expected a chunk_size of at least 1, found {chunk_size}")
    one_task = torch.func.grad_and_value(scalar_loss(loss_fn))
    if chunk_size == 1:
        each = [one_task(params, tree_map(lambda leaf, i=i: leaf[i], tasks)) for i in range(n)]
        stacked = tree_map(lambda *leaves: torch.stack(leaves), *each)
        return TaskGradients(*stacked)
    return TaskGradients(
        *torch.func.vmap(one_task, (None, 0), chunk_size=chunk_size)(params, tasks)
    )
