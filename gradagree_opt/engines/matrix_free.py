"""The matrix-free engine: every row sum from one Jacobian-vector product, s = J (Jᵀ 1)."""

from collections.abc import Callable
from contextlib import nullcontext
from threading import RLock

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.few_passes import apply_row_sums, measured_by, row_sums_refusal
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.stacks import PyTree, task_count, tree_norm
from gradagree_opt.engines.losses import TaskLoss, refuse_coarse
from gradagree_opt.engines.random_state import RandomState, check_same_losses
from gradagree_opt.engines.recomputed import cuts_refused, is_foreign, nodes_of
from gradagree_opt.engines.rows import Rows

Losses = Callable[[PyTree], Tensor]
Pullback = Callable[[PyTree], tuple[PyTree]]

FORWARD_MODE = RLock()
"""Held in forward mode, which is one for all threads: they would mix their tangents (2.14)."""


def matrix_free_refusal(aggregator: Aggregator, task_loss: TaskLoss, /) -> str | None:
    """Why the engine cannot serve an aggregator, in half a sentence; None where it can."""
    if not task_loss.signal_is_gradient:
        return "its signal is not the gradient"
    refusal = row_sums_refusal(aggregator)
    if refusal is None and aggregator.nonfinite == "drop":
        return "nonfinite='drop' needs the gradient of each task"
    return refusal


def matrix_free(
    task_loss: TaskLoss,
    params: PyTree,
    tasks: PyTree,
    aggregator: Aggregator,
    /,
) -> tuple[Aggregation, Float[Tensor, " n"]]:
    """Aggregation of n gradients of which none is ever formed, and the losses: d extra memory.

    One backward pass gives Σ g_j, one Jacobian-vector product along it every s_i, one backward
    pass of the weighted loss the update. The norms of single gradients stay unknown: diagnostics
    that need them are NaN. Where Σ g_j is made of rounding, the update is zero. Chunks of the tasks
    hold their graphs one after the other, for one more forward pass.

    Raises:
        RuntimeError: the parameters or the losses have less than the precision of float32.

    Source: ours; docs/engines.md.
    """
    n = task_count(tasks, "tasks")
    refuse_coarse(tree_leaves(params))
    chunks = _chunks(task_loss, params, tasks, n)
    losses, leaves, structure = _losses_and_sum(chunks, params, n)
    refuse_coarse([losses])
    norm = tree_norm(leaves)
    scale = or_one(norm)
    for index, leaf in enumerate(leaves):  # one by one, so that each reuses the memory of the last
        leaves[index] = leaf / scale.to(leaf.dtype)
    del leaf
    products = Rows(n)
    for chunk in chunks:
        products.append(chunk.times(params, tree_unflatten(leaves, structure)))
    leaves.clear()
    row_sums = products.stack.to(scale.dtype) / scale
    measured = measured_by(row_sums, scale, ~torch.isfinite(losses), aggregator)

    def weighted(weights: Tensor, _: list[int] | None) -> PyTree:
        update: PyTree = None
        for chunk, part in zip(chunks, torch.split(weights, chunks[0].n), strict=True):
            update = _plus(update, chunk.weighted_gradient(params, part.to(losses)))
        return update

    eps = torch.finfo(losses.dtype).eps
    return apply_row_sums(aggregator, measured, weighted, norm, eps), losses


def _losses_and_sum(
    chunks: "list[_Chunk]", params: PyTree, n: int
) -> tuple[Tensor, list[Tensor], TreeSpec]:
    """Losses ``[n]`` and Σ g_i, flat; the chunks hold their graphs one after the other."""
    rows = Rows(n)
    total: PyTree = None
    for chunk in chunks:
        losses, part = chunk.losses_and_sum(params)
        rows.append(losses)
        total = _plus(total, part)
    for chunk, losses in zip(chunks, torch.split(rows.stack, chunks[0].n), strict=True):
        chunk.first_losses = losses
    return rows.stack, *tree_flatten(total)


def _plus(total: PyTree, part: PyTree) -> PyTree:
    return part if total is None else tree_map(torch.add, total, part)


class _Chunk:
    """The tasks of one vmap; every pass over them draws what the first one drew.

    Args:
        keep: hold the graph of the first pass for the next ones.
        state: of the generators before the first pass; None for their state at that time.
    """

    def __init__(
        self, task_loss: TaskLoss, tasks: PyTree, *, keep: bool, state: RandomState | None
    ) -> None:
        self.n = task_count(tasks, "tasks")
        self._task_loss = task_loss
        self._tasks = tasks
        self._keep = keep
        self._state = state
        self.first_losses: Tensor
        self._backward: Pullback | None = None
        self._transposed: Pullback | None = None

    def losses(self, params: PyTree) -> Tensor:
        """Losses ``[n]`` of the tasks."""
        if self._state is not None:
            self._state.restore()
        elif self._task_loss.map.may_draw:
            self._state = RandomState(params, self._tasks, source=self._task_loss.map.source)
        losses: Tensor = self._task_loss.map(
            lambda params, task: self._task_loss.function(params, task)[0],
            params,
            self._tasks,
            self.n,
            differentiated=True,
        )
        return losses

    def losses_and_sum(self, params: PyTree) -> tuple[Tensor, PyTree]:
        """Losses ``[n]``, and Σ g_i."""
        losses, backward, foreign = _graph(self.losses, params)
        ones = torch.ones_like(losses)
        if not self._keep:
            return losses.detach(), backward(ones)[0]
        self._backward = backward
        try:
            with cuts_refused(foreign):
                total, self._transposed = _transpose(backward, ones)
        except RuntimeError:  # a model without second derivatives
            total = backward(ones)[0]
        return losses.detach(), total

    def times(self, params: PyTree, direction: PyTree) -> Tensor:
        """J · direction ``[n]``, by the graph of the first pass where it was kept."""
        transposed, self._transposed = self._transposed, None
        if transposed is None:
            return self._times_anew(params, direction)
        try:
            product: Tensor = transposed(direction)[0]
        except RuntimeError:
            product = self._times_anew(params, direction)
        return product

    def _times_anew(self, params: PyTree, direction: PyTree) -> Tensor:
        losses, product = _jacobian_times(self.losses, params, direction)
        check_same_losses(self.first_losses, losses)
        return product

    def weighted_gradient(self, params: PyTree, weights: Tensor) -> PyTree:
        """Σ w_i g_i."""
        if self._backward is not None:
            return self._backward(weights)[0]
        losses, backward = _pullback(self.losses, params)
        check_same_losses(self.first_losses, losses.detach())
        return backward(weights)[0]


def _chunks(task_loss: TaskLoss, params: PyTree, tasks: PyTree, n: int) -> list[_Chunk]:
    parts = task_loss.map.split(tasks, n)
    source = task_loss.map.source
    same = task_loss.map.randomness == "same"
    state = RandomState(params, tasks, source=source) if same else None
    return [_Chunk(task_loss, part, keep=len(parts) == 1, state=state) for part in parts]


def _jacobian_times(losses_of: Losses, params: PyTree, direction: PyTree) -> tuple[Tensor, Tensor]:
    """Losses, and J · direction ``[n]`` in forward mode, or by two backward passes without one."""
    try:
        with nullcontext() if torch.compiler.is_compiling() else FORWARD_MODE:
            losses, product = torch.func.jvp(losses_of, (params,), (direction,))[:2]
    except (RuntimeError, AssertionError):  # the latter of a generated vmap rule without jvp()
        losses, backward, foreign = _graph(losses_of, params)
        with cuts_refused(foreign):
            transposed = _transpose(backward, torch.ones_like(losses))[1]
        product = transposed(direction)[0]
    return losses.detach(), product


def _transpose(backward: Pullback, weights: Tensor) -> tuple[PyTree, Pullback]:
    """Σ w_i g_i, and J: the sum is linear in the weights, so that its own vjp is the Jacobian."""
    return _pullback(lambda weights: backward(weights)[0], weights)


def _graph(losses_of: Losses, params: PyTree) -> tuple[Tensor, Pullback, list[Node]]:
    """Losses, their pullback, and the nodes whose backward pass is somebody else's code."""
    foreign: list[Node] = []

    def noted(params: PyTree) -> Tensor:
        losses = losses_of(params)
        if not torch.compiler.is_compiling():
            foreign.extend(filter(is_foreign, nodes_of(losses)))
        return losses

    return *_pullback(noted, params), foreign


def _pullback(function: Callable[..., PyTree], at: PyTree) -> tuple[PyTree, Pullback]:
    """torch.func.vjp of one argument."""
    result = torch.func.vjp(function, at)
    return result[0], result[1]
