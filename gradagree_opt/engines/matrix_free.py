"""The matrix-free engine: every row sum from one Jacobian-vector product, s = J (Jᵀ 1)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gradagree_opt.aggregation import Aggregation, Aggregator, Measured
from gradagree_opt.annotations import Float
from gradagree_opt.engines.losses import TaskLoss
from gradagree_opt.engines.normalization import AffineApart
from gradagree_opt.engines.random_state import RandomState
from gradagree_opt.engines.rows import Rows
from gradagree_opt.stacks import PyTree, or_one, row_magnitudes, task_count, tree_norm
from gradagree_opt.statistics import Statistics

Losses = Callable[[PyTree], Tensor]


def matrix_free_refusal(aggregator: Aggregator, task_loss: TaskLoss, /) -> str | None:
    """Why the engine cannot serve an aggregator, in half a sentence; None where it can."""
    if not task_loss.signal_is_gradient:
        return "its signal is not the gradient"
    missing = sorted(aggregator.weighting.needs - {"draws"})
    if missing:
        return f"its weighting reads {', '.join(missing)}, which no row sum tells"
    if aggregator.scope != "global":
        return f"scope={aggregator.scope!r} needs the row sums of each group"
    if aggregator.match_norm == "agreement":
        return "match_norm='agreement' needs the norms of the gradients where they cancel"
    if aggregator.nonfinite == "drop":
        return "nonfinite='drop' needs the gradient of each task"
    return None


def matrix_free(
    task_loss: TaskLoss,
    params: PyTree,
    tasks: PyTree,
    aggregator: Aggregator,
    draws: Float[Tensor, " n"] | None,
    /,
) -> tuple[Aggregation, Float[Tensor, " n"]]:
    """Aggregation of n gradients of which none is ever formed, and the losses: d extra memory.

    One backward pass gives Σ g_j, one Jacobian-vector product along it every s_i, one backward
    pass of the weighted loss the update. The norms of single gradients stay unknown: diagnostics
    that need them are NaN. Chunks of the tasks hold their graphs one after the other, for one more
    forward pass.

    Source: PAPER, "the row sums without the N×d matrix".
    """
    n = task_count(tasks, "tasks")
    chunks = _chunks(task_loss, tasks, n)
    losses, total = _weighted_gradient(chunks, params, torch.ones(n))
    scale = or_one(row_magnitudes([leaf.unsqueeze(0) for leaf in tree_leaves(total)]).squeeze(0))
    direction = tree_map(lambda leaf: leaf / scale.to(leaf.dtype), total)
    products = Rows(n)
    for chunk in chunks:
        products.append(_jacobian_times(chunk.losses, params, direction))
    row_sums = products.stack.to(scale.dtype) / scale
    measured = _measured(row_sums, losses, scale, draws)

    def weighted(weights: Tensor, _: list[int] | None) -> PyTree:
        return _weighted_gradient(chunks, params, weights)[1]

    def uniform(weights: Tensor, _: list[int] | None) -> PyTree:
        return tree_map(lambda leaf: leaf * weights[0].to(leaf.dtype), total)

    aggregation = aggregator.apply(measured, weighted, signal_is_direction=True)
    nothing = measured.statistics._replace(row_sums=torch.zeros_like(row_sums))
    fallback = aggregator.apply(
        measured._replace(statistics=nothing), uniform, signal_is_direction=True
    )
    # Σ g_j made of rounding gives scores of rounding, and an update of the gradients' own length.
    rounding = 8 * torch.finfo(losses.dtype).eps * n**1.5
    cancelled = tree_norm(total) <= rounding * tree_norm(aggregation.update)
    degenerate = cancelled & fallback.diagnostics.degenerate
    return tree_map(lambda a, b: torch.where(degenerate, a, b), fallback, aggregation), losses


class _Chunk:
    """Tasks that one vmap takes, under the random numbers of the first pass at every pass.

    Args:
        keep: hold the graph of the first pass for the next ones.
        state: random numbers of the first pass; None for those that are due.
    """

    def __init__(
        self, task_loss: TaskLoss, tasks: PyTree, *, keep: bool, state: RandomState | None
    ) -> None:
        self.n = task_count(tasks, "tasks")
        self._task_loss = task_loss
        self._tasks = tasks
        self._keep = keep
        self._state = state
        self._kept: tuple[Tensor, Callable[[Tensor], tuple[PyTree]]] | None = None

    def losses(self, params: PyTree) -> Tensor:
        """Losses ``[n]`` of the tasks."""
        if self._state is not None:
            self._state.restore()
        elif self._task_loss.map.may_draw:
            self._state = RandomState(self._tasks)
        with AffineApart():
            losses: Tensor = self._task_loss.map(
                lambda task: self._task_loss.function(params, task)[0], self._tasks, self.n
            )
        return losses

    def weighted_gradient(self, params: PyTree, weights: Tensor) -> tuple[Tensor, PyTree]:
        """Losses ``[n]``, and Σ w_i g_i."""
        losses, backward = self._kept or _pullback(self.losses, params)
        if self._keep:
            self._kept = losses, backward
        return losses.detach(), backward(weights.to(losses))[0]


def _chunks(task_loss: TaskLoss, tasks: PyTree, n: int) -> list[_Chunk]:
    parts = task_loss.map.split(tasks, n)
    state = RandomState(tasks) if task_loss.map.randomness == "same" else None
    return [_Chunk(task_loss, part, keep=len(parts) == 1, state=state) for part in parts]


def _weighted_gradient(
    chunks: list[_Chunk], params: PyTree, weights: Tensor
) -> tuple[Tensor, PyTree]:
    """Losses and Σ w_i g_i over all chunks, which hold their graphs one after the other."""
    rows = Rows(len(weights))
    total: PyTree = None
    for chunk, part in zip(chunks, torch.split(weights, chunks[0].n), strict=True):
        losses, gradient = chunk.weighted_gradient(params, part)
        rows.append(losses)
        total = gradient if total is None else tree_map(torch.add, total, gradient)
    return rows.stack, total


def _measured(row_sums: Tensor, losses: Tensor, scale: Tensor, draws: Tensor | None) -> Measured:
    finite = torch.isfinite(losses)
    statistics = Statistics(
        row_sums=row_sums,
        squared_norms=None,
        cosine_row_sums=None,
        finite=finite,
        active=torch.ones_like(finite),
        scale=scale,
        draws=None if draws is None else draws.to(row_sums),
    )
    return Measured(statistics, ~finite, None)


def _jacobian_times(losses_of: Losses, params: PyTree, direction: PyTree) -> Tensor:
    """J · direction ``[n]`` in forward mode, or by two backward passes where a model has none."""
    try:
        product: Tensor = torch.func.jvp(losses_of, (params,), (direction,))[1]
    except RuntimeError:  # NotImplementedError is one
        losses = losses_of(params).detach()

        def gradient_of(cotangent: Tensor) -> PyTree:
            return _pullback(losses_of, params)[1](cotangent)[0]

        # Jᵀ v is linear in v, so that its own vjp is J.
        product = _pullback(gradient_of, torch.ones_like(losses))[1](direction)[0]
    return product


def _pullback(
    function: Callable[..., PyTree], at: PyTree
) -> tuple[PyTree, Callable[[PyTree], tuple[PyTree]]]:
    """torch.func.vjp of one argument."""
    result = torch.func.vjp(function, at)
    return result[0], result[1]
