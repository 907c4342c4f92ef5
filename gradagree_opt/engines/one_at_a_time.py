"""Gradients of n tasks of which one exists at a time: their statistics and their weighted sum."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.results import Measured
from gradagree_opt.core.scopes import group_indices
from gradagree_opt.core.stacks import PyTree, accumulation_dtype
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.engines.one_gradient import One, by_leaf, dot, measure_one, units_of
from gradagree_opt.engines.rows import Rows


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
        # 0 · NaN is NaN: a task of weight 0 is left out.
        parts = (torch.where(w == 0, 0, w.to(g) * g) for g, w in zip(gradient, each, strict=True))
        _add(total, parts)
        del gradient, parts  # before the next one is made
    leaves = tree_leaves(stream.params)
    cast = [a.to(b.dtype) for a, b in zip(total, leaves, strict=True)]
    return tree_unflatten(cast, tree_structure(stream.params))


def measured_in_two_passes(stream: Gradients, aggregator: Aggregator, /) -> tuple[Measured, Tensor]:
    """Statistics of the gradients: norms and Σ g_j in one pass, products with it in another."""
    groups = group_indices(stream.params, aggregator.scope)
    first = _norms_and_sums(stream, aggregator, groups)
    drop = aggregator.nonfinite == "drop"
    active = first.finite if drop else torch.ones_like(first.finite)
    # A gradient of zeros has scale 1 too, which is not to count for the others.
    says = active.reshape(-1, *[1] * (first.scales.ndim - 1)) & (first.squares != 0)
    sizes = torch.where(says, first.scales, 0)
    scale = or_one(sizes.amax(0))
    shares = sizes / scale
    squared_norms = torch.where(shares == 0, shares, shares.square() * first.squares).movedim(0, -1)
    dots, others, cosines = _products(stream, aggregator, groups, first, scale)
    statistics = Statistics(
        row_sums=dots.movedim(0, -1).to(squared_norms),
        squared_norms=squared_norms,
        cosine_row_sums=None if cosines is None else cosines.movedim(0, -1),
        finite=first.finite,
        active=active,
        scale=scale,
        other_row_sums=None if others is None else others.movedim(0, -1).to(squared_norms),
        nonzero=None if cosines is None else (first.squares != 0).movedim(0, -1),
    )
    return Measured(aggregator.with_draws(statistics), ~first.finite, groups), first.losses


class _First(NamedTuple):
    """What the first pass finds: of every gradient the entries of a :class:`One`, and the sums.

    ``scales`` and ``squares`` are ``[n, *groups]``; ``total`` is Σ_j g_j, and ``unit_total``
    Σ_j g_j / ‖g_j‖ where cosines are asked for.
    """

    losses: Float[Tensor, " n"]
    finite: Bool[Tensor, " n"]
    scales: Tensor
    squares: Tensor
    scaled: list[bool]
    total: list[Tensor]
    unit_total: list[Tensor]

    def one(self, task: int) -> One:
        return One(self.finite[task], self.scales[task], self.squares[task], self.scaled[task])


def _norms_and_sums(stream: Gradients, aggregator: Aggregator, groups: list[int] | None) -> _First:
    """The first pass; under nonfinite="drop" gradients that are not finite count as zeros."""
    drop, waits = aggregator.nonfinite == "drop", aggregator.nonfinite != "propagate"
    cosine = "cosine_row_sums" in aggregator.needs
    # Σ_j g_j − g_i of one task far larger than the others is rounding in float32.
    total = _zeros(stream, torch.float64 if "other_row_sums" in aggregator.needs else None)
    unit_total = _zeros(stream) if cosine else []
    losses, finite, scales, squares = rows = [Rows(stream.n) for _ in range(4)]
    scaled = []
    for loss, gradient in stream.gradients():
        one = measure_one(gradient, groups, waits=waits)
        scaled.append(one.scaled)
        sound = one.finite & torch.isfinite(loss)
        if drop:
            one = one._replace(square=torch.where(sound, one.square, 0))
        for results, value in zip(rows, (loss, sound, one.scale, one.square), strict=True):
            results.append(value.unsqueeze(0))
        kept = _kept(gradient, sound) if drop else gradient
        _add(total, kept)
        if cosine:
            _add(unit_total, units_of(kept, one, groups))
        del gradient, kept  # before the next one is made
    stacks = losses.stack, finite.stack, scales.stack, squares.stack
    return _First(*stacks, scaled, total, unit_total)


def _products(
    stream: Gradients,
    aggregator: Aggregator,
    groups: list[int] | None,
    first: _First,
    scale: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The second pass: ``[n, *groups]`` products with Σ_j g_j, with Σ_{j≠i} g_j, and of units.

    The last two are None if no weighting needs them.
    """
    waits = aggregator.nonfinite != "propagate"
    of_total, whole = measure_one(first.total, groups, waits=waits), torch.ones_like(scale)
    dots = Rows(stream.n)
    others = Rows(stream.n) if "other_row_sums" in aggregator.needs else None
    cosines = Rows(stream.n) if "cosine_row_sums" in aggregator.needs else None
    for index, (_, gradient) in enumerate(stream.gradients()):
        one = first.one(index)
        kept = _kept(gradient, one.finite) if aggregator.nonfinite == "drop" else gradient
        dots.append(dot(kept, one, first.total, of_total, groups, scale).unsqueeze(0))
        if others is not None:
            rest = [a - b for a, b in zip(first.total, kept, strict=True)]
            of_rest = measure_one(rest, groups, waits=waits)
            others.append(dot(kept, one, rest, of_rest, groups, scale).unsqueeze(0))
            del rest
        if cosines is not None:
            units = units_of(kept, one, groups)
            of_unit = One(one.finite, whole, whole, scaled=False)
            product = dot(units, of_unit, first.unit_total, of_unit, groups, whole)
            cosines.append(product.unsqueeze(0))
            del units
        del gradient, kept  # before the next one is made
    return (
        dots.stack,
        None if others is None else others.stack,
        None if cosines is None else cosines.stack,
    )


def _kept(gradient: Sequence[Tensor], sound: Tensor) -> list[Tensor]:
    """The gradient, or zeros where its task is not sound."""
    return [torch.where(sound, leaf, 0) for leaf in gradient]


def _add(total: list[Tensor], part: Iterable[Tensor]) -> None:
    """Adds to the total in its place."""
    for mine, leaf in zip(total, part, strict=True):
        mine.add_(leaf)


def _zeros(stream: Gradients, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Leaves of zeros, to add gradients to: of float32 or better if no dtype is given."""
    leaves = tree_leaves(stream.params)
    dtype = dtype or accumulation_dtype(leaves)
    return [torch.zeros_like(leaf, dtype=dtype).detach() for leaf in leaves]
