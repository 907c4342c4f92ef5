"""Measure: the few numbers that weightings need, from a task-stacked pytree of signals.

Every sum is kept in float32 or better and in units of the largest entry, so that entries from
1e-30 to 1e30 neither overflow nor vanish. The N×N Gram matrix is formed for the weightings that
ask for it and no others: s = J (Jᵀ 1).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.blocks import blocks_of_all, or_one, unit_parts
from gradagree_opt.stacks import (
    accumulation_dtype,
    full_precision,
    in_range,
    row_magnitudes,
    scaled_square_sums,
)


class Statistics(NamedTuple):
    """What is known of the signals g_i of n tasks; one row for each group of leaves, if grouped.

    Attributes:
        row_sums: s_i = g_i · Σ_j g_j, in units of scale² (PAPER: step 3 of the algorithm).
        squared_norms: ‖g_i‖², in units of scale²; None from an engine that forms no gradient of a
            single task, which no weighting that asked for them is given.
        other_row_sums: Σ_{j≠i} g_i · g_j, in units of scale², or None where no weighting asked for
            it: of one task far larger than the others, s_i − ‖g_i‖² would be rounding.
        cosine_row_sums: u_i · Σ_j u_j with u_i = g_i / ‖g_i‖ (0 for a zero signal), or None where
            no weighting asked for it.
        nonzero: whether u_i is not 0; None likewise.
        finite: False for the tasks with a NaN or infinite entry.
        active: False for the tasks that get weight 0 whatever the weighting.
        scale: power of two at most as large as the largest absolute entry of the signals, or 1:
            where all are zero, or none was needed.
        draws: positive random numbers, for the weightings that need them.
        gramian: g_i · g_j, in units of scale², or None where no weighting asked for it.
    """

    row_sums: Float[Tensor, "*groups n"]
    squared_norms: Float[Tensor, "*groups n"] | None
    cosine_row_sums: Float[Tensor, "*groups n"] | None
    finite: Bool[Tensor, " n"]
    active: Bool[Tensor, " n"]
    scale: Float[Tensor, "*groups"]
    draws: Float[Tensor, " n"] | None = None
    gramian: Float[Tensor, "*groups n n"] | None = None
    other_row_sums: Float[Tensor, "*groups n"] | None = None
    nonzero: Bool[Tensor, "*groups n"] | None = None


def measure(
    leaves: Sequence[Tensor],
    active: Bool[Tensor, " n"],
    needs: frozenset[str] = frozenset(),
    /,
    *,
    scaled: bool = True,
) -> Statistics:
    """Statistics of one group of task-stacked leaves ``[n, *shape]``, in one read of them.

    The cosine row sums take three more reads, the Gram matrix and the other row sums one.

    Args:
        leaves: task-stacked tensors.
        active: the tasks that may get a weight.
        needs: names of the optional statistics to measure.
        scaled: False takes 1 for the scale, which is faster; where that overflows or vanishes, all
            tasks are marked as not finite.
    """
    dtype = accumulation_dtype(leaves)
    with full_precision(leaves[0].device):
        parts = [
            (size, *_measure_part(blocks))
            for size, blocks in unit_parts(leaves, dtype, scaled=scaled)
        ]
        if not parts:
            zeros = active.new_zeros(active.shape, dtype=dtype)
            parts = [(zeros.new_zeros(()), zeros, zeros)]
        sizes, norms, dots = (torch.stack(column) for column in zip(*parts, strict=True))
        scale = or_one(sizes.amax())
        shares = (sizes / scale).unsqueeze(1)
        squared_norms = (shares * norms).square().sum(0)
        finite = torch.isfinite(norms).all(0)
        cosines, nonzero = _cosines(leaves) if "cosine_row_sums" in needs else (None, None)
        return Statistics(
            row_sums=(shares.square() * dots).sum(0),
            squared_norms=squared_norms,
            cosine_row_sums=cosines,
            finite=finite if scaled else finite & in_range(squared_norms.amax()),
            active=active,
            scale=scale,
            gramian=_gramian(leaves, scale) if "gramian" in needs else None,
            other_row_sums=_other_row_sums(leaves, scale) if "other_row_sums" in needs else None,
            nonzero=nonzero,
        )


def measure_groups(
    groups: Sequence[Sequence[Tensor]],
    active: Bool[Tensor, " n"],
    needs: frozenset[str] = frozenset(),
    /,
    *,
    scaled: bool = True,
) -> Statistics:
    """Statistics of several groups of leaves, one row each; the options are :func:`measure`'s."""
    each = [measure(leaves, active, needs, scaled=scaled) for leaves in groups]
    return Statistics(
        row_sums=torch.stack([s.row_sums for s in each]),
        squared_norms=_stack([s.squared_norms for s in each]),
        cosine_row_sums=_stack([s.cosine_row_sums for s in each]),
        finite=torch.stack([s.finite for s in each]).all(0),
        active=active,
        scale=torch.stack([s.scale for s in each]),
        gramian=_stack([s.gramian for s in each]),
        other_row_sums=_stack([s.other_row_sums for s in each]),
        nonzero=_stack([s.nonzero for s in each]),
    )


def from_gramian(gramian: Float[Tensor, "n n"], /) -> Statistics:
    """Statistics of n signals that are known by their inner products g_i · g_j alone.

    The scale is the largest norm, since no entry is known. Row sums made of the rounding of
    the dtype that was given, which may be half, are zero, those of the cosines too.
    """
    with full_precision(gramian.device):
        eps = torch.finfo(gramian.dtype).eps
        gramian = gramian.detach().to(accumulation_dtype([gramian]))
        finite = torch.isfinite(gramian.diagonal())
        norms = gramian.diagonal().clamp(min=0).sqrt()
        scale = or_one(norms.nan_to_num(0.0, 0.0, 0.0).amax())
        units = or_one(norms)
        scaled = gramian / scale / scale
        return Statistics(
            row_sums=_row_sums(scaled, eps),
            squared_norms=scaled.diagonal(),
            cosine_row_sums=_row_sums(gramian / units / units.unsqueeze(1), eps),
            finite=finite,
            active=torch.ones_like(finite),
            scale=scale,
            gramian=scaled,
            other_row_sums=_row_sums(scaled - scaled.diagonal().diag(), eps),
            nonzero=norms != 0,
        )


def _row_sums(matrix: Tensor, eps: float) -> Tensor:
    """The sums of the rows, all zero where they may come of entries rounded to eps."""
    sums = matrix.sum(1)
    rounding = 8 * eps * torch.linalg.vector_norm(matrix, dim=1).sum()
    return torch.where(sums.abs().sum() <= rounding, 0.0, sums)


def _measure_part(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """‖x_i‖ and x_i · Σ_j x_j of the rows of blocks side by side."""
    norms, dots = zip(
        *[
            (torch.linalg.vector_norm(block, dim=1), torch.mv(block, block.sum(0)))
            for block in blocks
        ],
        strict=True,
    )
    return torch.linalg.vector_norm(torch.stack(norms), dim=0), torch.stack(dots).sum(0)


def _cosines(leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """u_i · Σ_j u_j for u_i = g_i / ‖g_i‖, and whether u_i is not 0.

    Each task is taken in units of its own largest entry.
    """
    magnitudes = row_magnitudes(leaves)
    units = or_one(magnitudes)
    lengths = or_one(scaled_square_sums(leaves, units)).rsqrt()
    dots = [torch.zeros_like(units)]
    for block in blocks_of_all(leaves, units.dtype):
        matrix = block / units.unsqueeze(1)
        dots.append(matrix @ (lengths @ matrix))
    return lengths * torch.stack(dots).sum(0), magnitudes != 0


def _gramian(leaves: Sequence[Tensor], scale: Tensor) -> Tensor:
    """G_ij = (g_i / scale) · (g_j / scale)."""
    n = leaves[0].shape[0]
    products = [scale.new_zeros((n, n))]
    for block in blocks_of_all(leaves, scale.dtype):
        matrix = block / scale
        products.append(matrix @ matrix.T)
    return torch.stack(products).sum(0)


def _other_row_sums(leaves: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Σ_{j≠i} (g_i / scale) · (g_j / scale), from the sums of the tasks before and after each."""
    dots = [scale.new_zeros(leaves[0].shape[0])]
    for block in blocks_of_all(leaves, scale.dtype):
        matrix = block / scale
        before = pad(matrix[:-1].cumsum(0), (0, 0, 1, 0))
        after = pad(matrix[1:].flip(0).cumsum(0).flip(0), (0, 0, 0, 1))
        dots.append((matrix * (before + after)).sum(1))
    return torch.stack(dots).sum(0)


def _stack(values: Sequence[Tensor | None]) -> Tensor | None:
    """The values of all groups, or None where they were not measured."""
    measured = [value for value in values if value is not None]
    return torch.stack(measured) if measured else None
