"""The streamed engine: one task's gradient at a time, by first-order autograd alone."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.aggregation import Aggregation, Aggregator, Measured
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.scopes import group_indices, measure_by_group
from gradagree_opt.core.stacks import PyTree, accumulation_dtype, task_count
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.engines.kept import Model
from gradagree_opt.engines.losses import TaskLoss
from gradagree_opt.engines.random_state import RandomState, check_same_losses
from gradagree_opt.engines.rows import Rows


def streamed_refusal(aggregator: Aggregator, task_loss: TaskLoss, /) -> str | None:
    """Why the engine cannot serve an aggregator, in half a sentence; None where it can."""
    known = {"draws", "squared_norms", "cosine_row_sums", "other_row_sums"}
    if not task_loss.signal_is_gradient:
        known |= {"relative_norms", "cosines", "gramian"}  # of a stack that is held
    missing = sorted(aggregator.needs - known)
    if missing:
        return f"its weighting reads {', '.join(missing)}, which needs all gradients at once"
    if aggregator.nonfinite == "drop" and not task_loss.signal_is_gradient:
        return "nonfinite='drop' needs the gradients of all tasks before the first is weighted"
    return None


def streamed(
    task_loss: TaskLoss,
    params: PyTree,
    tasks: PyTree,
    aggregator: Aggregator,
    draws: Float[Tensor, " n"] | None,
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
    stream = _Stream(task_loss, params, tasks)
    measure = _measured_in_two_passes if task_loss.signal_is_gradient else _measured_forward
    measured, losses = measure(stream, aggregator, draws)

    def weighted(weights: Tensor, groups: list[int] | None) -> PyTree:
        total = stream.zeros()
        for index, (_, gradient) in enumerate(stream.gradients()):
            each = _by_leaf(weights[..., index], groups, len(total))
            for place, (leaf, weight) in enumerate(zip(gradient, each, strict=True)):
                # 0 · NaN is NaN: a task of weight 0 is left out.
                part = torch.where(weight == 0, torch.zeros_like(leaf), weight.to(leaf) * leaf)
                total[place] = total[place] + part
        return stream.like_params(total)

    signal_is_direction = task_loss.signal_is_gradient
    return aggregator.apply(measured, weighted, signal_is_direction=signal_is_direction), losses


def _measured_forward(
    stream: "_Stream", aggregator: Aggregator, draws: Tensor | None
) -> tuple[Measured, Tensor]:
    """Statistics of signals that the forward pass tells, and the losses."""
    losses, signal = stream.losses_and_signals()
    return aggregator.measure(signal, nonfinite=~torch.isfinite(losses), draws=draws), losses


def _measured_in_two_passes(
    stream: "_Stream", aggregator: Aggregator, draws: Tensor | None
) -> tuple[Measured, Tensor]:
    """Statistics of the gradients: norms and Σ g_j in one pass, products with it in another."""
    groups = group_indices(stream.params, aggregator.scope)
    drop = aggregator.nonfinite == "drop"
    cosine = "cosine_row_sums" in aggregator.needs
    # Σ_j g_j − g_i of one task far larger than the others is rounding in float32.
    others = "other_row_sums" in aggregator.needs
    losses, scales, squares, finite = (Rows(stream.n) for _ in range(4))
    total, unit_total = stream.zeros(torch.float64 if others else None), stream.zeros()
    for loss, gradient in stream.gradients():
        one = _measure_one(gradient, groups)
        sound = one.finite & torch.isfinite(loss)
        for results, value in zip(
            (losses, scales, squares, finite), (loss, one.scale, one.square, sound), strict=True
        ):
            results.append(value.unsqueeze(0))
        kept = _kept(gradient, sound) if drop else gradient
        total = _sums(total, kept)
        if cosine:
            unit_total = _sums(unit_total, _units(kept, one, groups))
    active = finite.stack if drop else torch.ones_like(finite.stack)
    # A scale of 1 stands for zeros too, which say nothing of the others.
    says = active.reshape(-1, *[1] * (scales.stack.ndim - 1)) & (squares.stack != 0)
    sizes = torch.where(says, scales.stack, torch.zeros_like(scales.stack))
    scale = or_one(sizes.amax(0))
    dots, other_dots, cosines = Rows(stream.n), Rows(stream.n), Rows(stream.n)
    ones = torch.ones_like(scale)
    for index, (_, gradient) in enumerate(stream.gradients()):
        kept = _kept(gradient, finite.stack[index]) if drop else gradient
        dots.append(_dot(kept, total, groups, scale).unsqueeze(0))
        if others:
            rest = [a - b for a, b in zip(total, kept, strict=True)]
            other_dots.append(_dot(kept, rest, groups, scale).unsqueeze(0))
        if cosine:
            one = _One(finite.stack[index], scales.stack[index], squares.stack[index])
            units = _units(kept, one, groups)
            cosines.append(_dot(units, unit_total, groups, ones).unsqueeze(0))
    shares = sizes / scale
    draws = aggregator.draw(stream.n) if draws is None else draws
    squared_norms = torch.where(shares == 0, shares, shares.square() * squares.stack).movedim(0, -1)
    statistics = Statistics(
        row_sums=dots.stack.movedim(0, -1).to(squared_norms),
        squared_norms=squared_norms,
        cosine_row_sums=cosines.stack.movedim(0, -1) if cosine else None,
        finite=finite.stack,
        active=active,
        scale=scale,
        draws=None if draws is None else draws.to(squared_norms),
        other_row_sums=other_dots.stack.movedim(0, -1).to(squared_norms) if others else None,
        nonzero=(squares.stack != 0).movedim(0, -1) if cosine else None,
    )
    return Measured(statistics, ~finite.stack, groups), losses.stack


class _Stream:
    """The gradients of the tasks, each pass of the same random numbers and buffers."""

    def __init__(self, task_loss: TaskLoss, params: PyTree, tasks: PyTree) -> None:
        self.params = params
        self._task_loss = task_loss
        self._tasks = tasks
        self.n = task_count(tasks, "tasks")
        self._random_state = RandomState(params, tasks, source=task_loss.map.source)
        self._model = Model(task_loss.map.source)
        self._losses: Tensor | None = None
        self._leaves = [leaf.detach().requires_grad_() for leaf in tree_leaves(params)]
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
        for task in self._each():
            with torch.enable_grad():
                loss, _ = self._task_loss.function(at, task)
            losses.append(loss.detach().unsqueeze(0))
            if not loss.requires_grad:  # of no parameter
                yield loss, self.zeros()
                continue
            found = torch.autograd.grad(loss, self._leaves, materialize_grads=True)
            yield loss.detach(), [each.to_dense().to(self._dtype) for each in found]
        self._compare(losses.stack)

    def zeros(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Leaves of zeros, to add gradients to: of their own dtype if none is given."""
        dtype = dtype or self._dtype
        return [torch.zeros_like(leaf, dtype=dtype).detach() for leaf in self._leaves]

    def like_params(self, leaves: list[Tensor]) -> PyTree:
        """The leaves in the dtypes and the structure of the parameters."""
        cast = [a.to(b.dtype) for a, b in zip(leaves, self._leaves, strict=True)]
        return tree_unflatten(cast, tree_structure(self.params))

    def _compare(self, losses: Tensor) -> None:
        """One host synchronisation: whether a pass has drawn what the first one drew."""
        if self._losses is None:
            self._losses = losses
        else:
            check_same_losses(self._losses, losses)

    def _each(self) -> Iterator[PyTree]:
        self._random_state.restore()
        self._model.restore()
        return self._task_loss.map.one_by_one(self.params, self._tasks, self.n)


class _One(NamedTuple):
    """What is known of one gradient: whether it is finite, and in each group scale and ‖g‖²."""

    finite: Bool[Tensor, ""]
    scale: Float[Tensor, "*groups"]
    square: Float[Tensor, "*groups"]


def _measure_one(gradient: list[Tensor], groups: list[int] | None) -> _One:
    measured = _measure([leaf.unsqueeze(0) for leaf in gradient], groups)
    assert measured.squared_norms is not None
    return _One(measured.finite.squeeze(0), measured.scale, measured.squared_norms.squeeze(-1))


def _measure(
    leaves: list[Tensor], groups: list[int] | None, needs: frozenset[str] = frozenset()
) -> Statistics:
    active = torch.ones(leaves[0].shape[0], dtype=torch.bool, device=leaves[0].device)
    return measure_by_group(leaves, groups, active, needs, scaled=True)


def _dot(
    a: list[Tensor], b: list[Tensor], groups: list[int] | None, scale: Tensor
) -> Float[Tensor, "*groups"]:
    """Inner product of two gradients in each group, in units of scale²."""
    pair = [torch.stack(leaves) for leaves in zip(a, b, strict=True)]
    measured = _measure(pair, groups, frozenset({"gramian"}))
    assert measured.gramian is not None
    return measured.gramian[..., 0, 1] * (measured.scale / scale).square()


def _units(gradient: list[Tensor], one: _One, groups: list[int] | None) -> list[Tensor]:
    """The gradient by its norm in each group; zero for a zero gradient."""
    scale, norm = one.scale, or_one(one.square).sqrt()
    return [
        leaf / s / r
        for leaf, s, r in zip(
            gradient,
            _by_leaf(scale, groups, len(gradient)),
            _by_leaf(norm, groups, len(gradient)),
            strict=True,
        )
    ]


def _by_leaf(values: Tensor, groups: list[int] | None, leaves: int) -> list[Tensor]:
    """The value of every leaf, from one for all or one for each group."""
    return [values if groups is None else values[groups[index]] for index in range(leaves)]


def _kept(gradient: list[Tensor], sound: Tensor) -> list[Tensor]:
    """The gradient, or zeros where its task is not sound."""
    return [torch.where(sound, leaf, torch.zeros_like(leaf)) for leaf in gradient]


def _sums(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]
