"""The streamed engine: one task's gradient at a time, by first-order autograd alone."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.results import Aggregation, Measured
from gradagree_opt.core.scopes import group_indices
from gradagree_opt.core.shards import of_no_task
from gradagree_opt.core.stacks import PyTree, accumulation_dtype, task_count
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.engines.kept import Model
from gradagree_opt.engines.losses import TaskLoss, refuse_independent
from gradagree_opt.engines.one_gradient import One, by_leaf, dot, measure_one, units_of
from gradagree_opt.engines.random_state import RandomState, check_same_losses
from gradagree_opt.engines.recomputed import from_these, nodes_of, refuse_reentrant
from gradagree_opt.engines.rows import Rows


def streamed_refusal(aggregator: Aggregator, task_loss: TaskLoss, /) -> str | None:
    """Why the engine cannot serve an aggregator, in half a sentence; None where it can."""
    known = {"draws", "squared_norms", "cosine_row_sums", "other_row_sums"}
    if not task_loss.signal_is_gradient:
        known |= {"relative_norms", "cosines", "gramian"}  # of a stack that is held
    missing = sorted(aggregator.needs - known)
    if missing:
        return f"its weighting reads {', '.join(missing)}, which needs all gradients at once"
    if aggregator.ranks is not None and task_loss.signal_is_gradient:
        return "its passes sum the gradients of one rank's tasks alone"
    if aggregator.nonfinite == "drop" and not task_loss.signal_is_gradient:
        return "nonfinite='drop' needs the gradients of all tasks before the first is weighted"
    return None


def streamed(
    task_loss: TaskLoss,
    params: PyTree,
    tasks: PyTree,
    aggregator: Aggregator,
    /,
) -> tuple[Aggregation, Float[Tensor, " n"]]:
    """Aggregation of n gradients of which one exists at a time, and the losses: d extra memory.

    Three backward passes a task, for Σ g_j, for every g_i · Σ_j g_j and for Σ w_i g_i: the weights
    are known only when all scores are. Where the signal is known from the forward pass, its stack
    is held, and one backward pass a task does.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "expected a mode in which autograd can be switched on, found torch.inference_mode(); "
            "take torch.no_grad(), or no such block"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            "expected a call outside of the transforms of torch.func, found one within, where "
            "autograd alone cannot differentiate; take engine='stacked'"
        )
    stream = _Stream(task_loss, params, tasks)
    try:
        if task_loss.signal_is_gradient:
            measured, losses = measured_in_two_passes(stream, aggregator)
        else:
            losses, signal = stream.losses_and_signals()
            measured = aggregator.measure(
                signal, directions=of_no_task(params), nonfinite=~torch.isfinite(losses)
            )
        aggregation = aggregator.apply(measured, partial(weighted_sum, stream))
    finally:
        stream.model.restore_parameters()
    return aggregation, losses


@runtime_checkable
class Gradients(Protocol):
    """The gradients of n tasks, one at a time."""

    params: PyTree
    n: int

    def gradients(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        """Loss and gradient of every task in turn, the same at each call; float32 or better."""


def weighted_sum(stream: Gradients, weights: Tensor, groups: list[int] | None, /) -> PyTree:
    """Σ_i w_i g_i in one pass, in the dtypes and the structure of the parameters."""
    total = _zeros(stream)
    for index, (_, gradient) in enumerate(stream.gradients()):
        each = by_leaf(weights[..., index], groups, len(total))
        for place, (leaf, weight) in enumerate(zip(gradient, each, strict=True)):
            # 0 · NaN is NaN: a task of weight 0 is left out.
            part = torch.where(weight == 0, torch.zeros_like(leaf), weight.to(leaf) * leaf)
            total[place] = total[place] + part
        del gradient, leaf, part  # before the next one is made
    leaves = tree_leaves(stream.params)
    cast = [a.to(b.dtype) for a, b in zip(total, leaves, strict=True)]
    return tree_unflatten(cast, tree_structure(stream.params))


def measured_in_two_passes(stream: Gradients, aggregator: Aggregator, /) -> tuple[Measured, Tensor]:
    """Statistics of the gradients: norms and Σ g_j in one pass, products with it in another."""
    groups = group_indices(stream.params, aggregator.scope)
    drop = aggregator.nonfinite == "drop"
    cosine = "cosine_row_sums" in aggregator.needs
    # Σ_j g_j − g_i of one task far larger than the others is rounding in float32.
    others = "other_row_sums" in aggregator.needs
    losses, scales, squares, finite = (Rows(stream.n) for _ in range(4))
    total = _zeros(stream, torch.float64 if others else None)
    unit_total = _zeros(stream) if cosine else []
    waits, scaled = aggregator.nonfinite != "propagate", []
    for loss, gradient in stream.gradients():
        one = measure_one(gradient, groups, waits=waits)
        scaled.append(one.scaled)
        sound = one.finite & torch.isfinite(loss)
        if drop:
            one = one._replace(square=torch.where(sound, one.square, 0))
        for results, value in zip(
            (losses, scales, squares, finite), (loss, one.scale, one.square, sound), strict=True
        ):
            results.append(value.unsqueeze(0))
        kept = _kept(gradient, sound) if drop else gradient
        _add(total, kept)
        if cosine:
            _add(unit_total, units_of(kept, one, groups))
        del gradient, kept  # before the next one is made
    active = finite.stack if drop else torch.ones_like(finite.stack)
    # A scale of 1 stands for zeros too, which say nothing of the others.
    says = active.reshape(-1, *[1] * (scales.stack.ndim - 1)) & (squares.stack != 0)
    sizes = torch.where(says, scales.stack, torch.zeros_like(scales.stack))
    scale = or_one(sizes.amax(0))
    shares = sizes / scale
    of_total, whole = measure_one(total, groups, waits=waits), torch.ones_like(scale)
    dots, other_dots, cosines = Rows(stream.n), Rows(stream.n), Rows(stream.n)
    for index, (_, gradient) in enumerate(stream.gradients()):
        kept = _kept(gradient, finite.stack[index]) if drop else gradient
        one = One(finite.stack[index], scales.stack[index], squares.stack[index], scaled[index])
        dots.append(dot(kept, one, total, of_total, groups, scale).unsqueeze(0))
        if others:
            rest = [a - b for a, b in zip(total, kept, strict=True)]
            of_rest = measure_one(rest, groups, waits=waits)
            other_dots.append(dot(kept, one, rest, of_rest, groups, scale).unsqueeze(0))
            del rest
        if cosine:
            units = units_of(kept, one, groups)
            of_unit = One(one.finite, whole, whole, scaled=False)
            product = dot(units, of_unit, unit_total, of_unit, groups, whole)
            cosines.append(product.unsqueeze(0))
            del units
        del gradient, kept  # before the next one is made
    squared_norms = torch.where(shares == 0, shares, shares.square() * squares.stack).movedim(0, -1)
    statistics = Statistics(
        row_sums=dots.stack.movedim(0, -1).to(squared_norms),
        squared_norms=squared_norms,
        cosine_row_sums=cosines.stack.movedim(0, -1) if cosine else None,
        finite=finite.stack,
        active=active,
        scale=scale,
        other_row_sums=other_dots.stack.movedim(0, -1).to(squared_norms) if others else None,
        nonzero=(squares.stack != 0).movedim(0, -1) if cosine else None,
    )
    return Measured(aggregator.with_draws(statistics), ~finite.stack, groups), losses.stack


class _Stream:
    """The gradients of the tasks, each pass of the same random numbers and buffers."""

    def __init__(self, task_loss: TaskLoss, params: PyTree, tasks: PyTree) -> None:
        self.params = params
        self._task_loss = task_loss
        self._tasks = tasks
        self.n = task_count(tasks, "tasks")
        self._random_state = RandomState(params, tasks, source=task_loss.map.source)
        self.model = Model(task_loss.map.source)
        self._losses: Tensor | None = None
        # A tensor of inference mode cannot require a gradient.
        self._leaves = [
            (leaf.clone() if leaf.is_inference() else leaf.detach()).requires_grad_()
            for leaf in tree_leaves(params)
        ]
        self._dtype = accumulation_dtype(self._leaves)

    def losses_and_signals(self) -> tuple[Tensor, PyTree]:
        """Losses ``[n]`` and the stack of the signals, without a backward pass."""
        with torch.no_grad():
            known = [self._task_loss.function(self.params, task)[1] for task in self._each()]
        signals, losses = tree_map(lambda *leaves: torch.stack(leaves), *known)
        self._compare(losses)
        return losses, signals

    def gradients(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Loss of every task and the leaves of its gradient, in float32 or better."""
        at = tree_unflatten(self._leaves, tree_structure(self.params))
        losses = Rows(self.n)
        self._depends = False
        for task in self._each():
            with torch.enable_grad():
                loss, _ = self._task_loss.function(at, task)
            losses.append(loss.detach().unsqueeze(0))
            # Held by no name here, so that it is gone when the next one is made.
            yield loss.detach(), self._gradient(loss)
        if not self._depends:
            refuse_independent()
        self._compare(losses.stack)

    def _gradient(self, loss: Tensor) -> list[Tensor]:
        """Zeros where the loss depends on no parameter; notes whether that of any task does."""
        found: Sequence[Tensor | None] = [None] * len(self._leaves)
        if loss.requires_grad:
            with from_these(self._leaves, self.model.modules, loss):
                found = torch.autograd.grad(loss, self._leaves, allow_unused=True)
            if any(each is None for each in found):
                refuse_reentrant(nodes_of(loss))
        self._depends = self._depends or any(each is not None for each in found)
        return [
            torch.zeros_like(leaf, dtype=self._dtype).detach()
            if each is None
            else each.to_dense().to(self._dtype)
            for each, leaf in zip(found, self._leaves, strict=True)
        ]

    def _compare(self, losses: Tensor) -> None:
        """One host synchronisation: whether a pass has drawn what the first one drew."""
        if self._losses is None:
            self._losses = losses
        else:
            check_same_losses(self._losses, losses)

    def _each(self) -> Iterator[PyTree]:
        self._random_state.restore()
        self.model.restore()
        return self._task_loss.map.one_by_one(self.params, self._tasks, self.n)


def _kept(gradient: Sequence[Tensor], sound: Tensor) -> list[Tensor]:
    """The gradient, or zeros where its task is not sound."""
    return [torch.where(sound, leaf, torch.zeros_like(leaf)) for leaf in gradient]


def _add(total: list[Tensor], part: Sequence[Tensor]) -> None:
    """Adds to the total in its place."""
    for mine, leaf in zip(total, part, strict=True):
        mine.add_(leaf)


def _zeros(stream: Gradients, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Leaves of zeros, to add gradients to: of float32 or better if no dtype is given."""
    leaves = tree_leaves(stream.params)
    dtype = dtype or accumulation_dtype(leaves)
    return [torch.zeros_like(leaf, dtype=dtype).detach() for leaf in leaves]
