"""Gradients of n tasks and their aggregation in one call, by the engine that suits the model."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gradagree_opt.aggregation import Aggregator
from gradagree_opt.annotations import Float
from gradagree_opt.diagnostics import Diagnostics
from gradagree_opt.engines.stacked import LossFn, TaskGradients, task_gradients
from gradagree_opt.stacks import PyTree
from gradagree_opt.weightings import check_choice


class AggregatedGradients(NamedTuple):
    """An :class:`~gradagree_opt.Aggregation` with the losses ``[n]`` and the engine that ran."""

    update: PyTree
    weights: Float[Tensor, "*groups n"]
    scores: Float[Tensor, "*groups n"]
    diagnostics: Diagnostics
    losses: Float[Tensor, " n"]
    engine: str


def aggregate_gradients(
    loss_fn: LossFn,
    params: PyTree,
    tasks: PyTree,
    aggregator: Aggregator,
    /,
    *,
    engine: Literal["auto", "stacked"] = "auto",
    chunk_size: int | None = None,
    compile: bool = False,
) -> AggregatedGradients:
    """Per-task gradients and their aggregation: multi-task learning without a loop.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` of one task.
        params: pytree of floating-point tensors, shared by the tasks.
        tasks: the batch of every task, a pytree with leaves ``[n, *shape]``.
        aggregator: what weights the tasks; signal and direction are both the gradient.
        engine: "stacked" holds all n gradients; "auto" chooses.
        chunk_size: tasks per vmap; None for all at once, 1 for no vmap.
        compile: torch.compile the gradients, once for each loss function.

    Returns:
        The aggregation with ``losses`` ``[n]`` and the name of the ``engine`` that ran.

    Raises:
        ValueError, TypeError: as :func:`task_gradients` and :meth:`Aggregator.aggregate`.

    >>> import gradagree_opt as ga
    >>> loss_fn = lambda w, x: ((w - x) ** 2).mean()
    >>> tasks = torch.tensor([[1.0], [2.0], [3.0]])
    >>> result = ga.aggregate_gradients(loss_fn, torch.tensor(0.0), tasks, ga.GradientAgreement())
    >>> result.update, result.engine
    (tensor(-4.6667), 'stacked')
    """
    check_choice("engine", engine, ("auto", "stacked"))
    gradients_of = _compiled(loss_fn, chunk_size) if compile else _eager(loss_fn, chunk_size)
    gradients, losses = gradients_of(params, tasks)
    return AggregatedGradients(*aggregator.aggregate(gradients), losses=losses, engine="stacked")


def _eager(loss_fn: LossFn, chunk_size: int | None) -> Callable[[PyTree, PyTree], TaskGradients]:
    return lambda params, tasks: task_gradients(loss_fn, params, tasks, chunk_size=chunk_size)


@lru_cache(maxsize=16)
def _compiled(loss_fn: LossFn, chunk_size: int | None) -> Callable[[PyTree, PyTree], TaskGradients]:
    return torch.compile(_eager(loss_fn, chunk_size), fullgraph=True, dynamic=False)
