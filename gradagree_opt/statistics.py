"""Measure: the few numbers that weightings need, from a task-stacked pytree of signals.

Every sum is kept in float32 or better and in units of the largest entry, so that entries from
1e-30 to 1e30 neither overflow nor vanish. The N×N Gram matrix is formed for the weightings that
ask for it and no others: s = J (Jᵀ 1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.stacks import (
    accumulation_dtype,
    full_precision,
    row_magnitudes,
    rows,
    scaled_square_sums,
)


class Statistics(NamedTuple):
    """What is known of the signals g_i of n tasks; one row for each group of leaves, if grouped.

    Attributes:
        row_sums: s_i = g_i · Σ_j g_j, in units of scale² (PAPER: step 3 of the algorithm).
        squared_norms: ‖g_i‖², in units of scale².
        cosine_row_sums: u_i · Σ_j u_j with u_i = g_i / ‖g_i‖ (0 for a zero signal), or None where
            no weighting asked for it.
        finite: False for the tasks with a NaN or infinite entry.
        active: False for the tasks that get weight 0 whatever the weighting.
        scale: largest absolute entry of the signals; 1 where all are zero.
        draws: positive random numbers, for the weightings that need them.
        gramian: g_i · g_j, in units of scale², or None where no weighting asked for it.
    """

    row_sums: Float[Tensor, "*groups n"]
    squared_norms: Float[Tensor, "*groups n"]
    cosine_row_sums: Float[Tensor, "*groups n"] | None
    finite: Bool[Tensor, " n"]
    active: Bool[Tensor, " n"]
    scale: Float[Tensor, "*groups"]
    draws: Float[Tensor, " n"] | None = None
    gramian: Float[Tensor, "*groups n n"] | None = None


def measure(
    leaves: Sequence[Tensor],
    active: Bool[Tensor, " n"],
    /,
    *,
    cosine: bool = False,
    gramian: bool = False,
) -> Statistics:
    """Statistics of one group of task-stacked leaves ``[n, *shape]``."""
    with full_precision(leaves[0].device):
        magnitudes = row_magnitudes(leaves)
        scale = _or_one(magnitudes.nan_to_num(0.0, 0.0, 0.0).amax())
        units = _or_one(magnitudes)
        squares = scaled_square_sums(leaves, units)
        shares = magnitudes / scale
        return Statistics(
            row_sums=_row_sums(leaves, shares, units),
            squared_norms=shares.square() * squares,
            cosine_row_sums=(
                _row_sums(leaves, _or_one(squares).rsqrt(), units) if cosine else None
            ),
            finite=torch.isfinite(magnitudes),
            active=active,
            scale=scale,
            gramian=_gramian(leaves, scale) if gramian else None,
        )


def measure_groups(
    groups: Sequence[Sequence[Tensor]],
    active: Bool[Tensor, " n"],
    /,
    *,
    cosine: bool = False,
    gramian: bool = False,
) -> Statistics:
    """Statistics of several groups of leaves, one row each."""
    each = [measure(leaves, active, cosine=cosine, gramian=gramian) for leaves in groups]
    return Statistics(
        row_sums=torch.stack([s.row_sums for s in each]),
        squared_norms=torch.stack([s.squared_norms for s in each]),
        cosine_row_sums=_stack([s.cosine_row_sums for s in each]),
        finite=torch.stack([s.finite for s in each]).all(0),
        active=active,
        scale=torch.stack([s.scale for s in each]),
        gramian=_stack([s.gramian for s in each]),
    )


def from_gramian(gramian: Float[Tensor, "n n"], /) -> Statistics:
    """Statistics of n signals that are known by their inner products g_i · g_j alone.

    The scale is the largest norm, since no entry is known.
    """
    with full_precision(gramian.device):
        gramian = gramian.detach().to(accumulation_dtype([gramian]))
        finite = torch.isfinite(gramian.diagonal())
        norms = gramian.diagonal().clamp(min=0).sqrt()
        scale = _or_one(norms.nan_to_num(0.0, 0.0, 0.0).amax())
        units = _or_one(norms)
        scaled = gramian / scale / scale
        return Statistics(
            row_sums=scaled.sum(1),
            squared_norms=scaled.diagonal(),
            cosine_row_sums=(gramian / units / units.unsqueeze(1)).sum(1),
            finite=finite,
            active=torch.ones_like(finite),
            scale=scale,
            gramian=scaled,
        )


def _row_sums(leaves: Sequence[Tensor], lengths: Tensor, units: Tensor) -> Tensor:
    """v_i · Σ_j v_j for v_i = lengths_i · g_i / units_i; no entry of g_i / units_i exceeds 1."""
    n = lengths.shape[0]
    dtype = lengths.dtype
    coefficients = lengths / units / n
    dots = []
    for leaf in leaves:
        matrix = rows(leaf).to(dtype)
        dots.append(matrix @ (coefficients @ matrix))
    return lengths * n * (torch.stack(dots).sum(0) / units)


def _gramian(leaves: Sequence[Tensor], scale: Tensor) -> Tensor:
    """G_ij = (g_i / scale) · (g_j / scale)."""
    products = []
    for leaf in leaves:
        matrix = rows(leaf).to(scale.dtype) / scale
        products.append(matrix @ matrix.T)
    return torch.stack(products).sum(0)


def _stack(values: Sequence[Tensor | None]) -> Tensor | None:
    """The values of all groups, or None where they were not measured."""
    measured = [value for value in values if value is not None]
    return torch.stack(measured) if measured else None


def _or_one(values: Tensor) -> Tensor:
    """The values, with 1 in place of zeros: safe to divide by."""
    return torch.where(values == 0, torch.ones_like(values), values)
