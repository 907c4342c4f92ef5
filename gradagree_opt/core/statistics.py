"""Measure: the few numbers that weightings need, from a task-stacked pytree of signals.

Every sum is kept in float32 or better and in units of the largest entry, so that entries from
1e-30 to 1e30 neither overflow nor vanish. The N×N Gram matrix is formed for the weightings that
ask for it and no others: s = J (Jᵀ 1).
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.blocks import blocks_of_all, or_one, row_unit_parts, unit_parts
from gradagree_opt.core.devices import fused_kernels
from gradagree_opt.core.positive_definite import diagonal
from gradagree_opt.core.stacks import (
    accumulation_dtype,
    full_precision,
    in_range,
    row_magnitudes,
    scaled_square_sums,
)


class Statistics(NamedTuple):
    """What is known of the signals g_i of n tasks; one row for each group of leaves, if grouped.

    Attributes:
        row_sums: s_i = g_i · Σ_j g_j, in units of scale² (Eshratifar et al. 2018, algorithm 1).
        squared_norms: ‖g_i‖², in units of scale²; None from an engine that forms no gradient of a
            single task, which no weighting that asked for them is given.
        other_row_sums: Σ_{j≠i} g_i · g_j, in units of scale², or None where no weighting asked for
            it: of one task far larger than the others, s_i − ‖g_i‖² would be rounding.
        cosine_row_sums: u_i · Σ_j u_j with u_i = g_i / ‖g_i‖ (0 for a zero signal), or None where
            no weighting asked for it.
        nonzero: whether u_i is not 0; None likewise, and where no Gram matrix was measured.
        finite: False for the tasks with a NaN or infinite entry.
        active: False for the tasks that get weight 0 whatever the weighting.
        scale: power of two at most as large as the largest absolute entry of the signals, or 1:
            where all are zero, or none was needed.
        draws: positive random numbers, for the weightings that need them.
        gramian: g_i · g_j, in units of scale², or None where no weighting asked for it.
        cosines: u_i · u_j, its row and column 0 for a zero signal; None where no Gram matrix was
            asked for.
        relative_norms: ‖g_i‖ / τ, τ the median norm of the active signals that are not zero (of an
            even number the mean of the middle two); None where no weighting asked for it.
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
    cosines: Float[Tensor, "*groups n n"] | None = None
    relative_norms: Float[Tensor, "*groups n"] | None = None


OF_GRAMIAN = frozenset({"gramian", "cosines"})
"""The statistics that come with the Gram matrix, and relative norms with them."""
OF_OTHERS = frozenset({"cosine_row_sums", "other_row_sums"})
"""Those that it tells too, where they are asked for."""


def measure(
    leaves: Sequence[Tensor],
    active: Bool[Tensor, " n"],
    needs: frozenset[str] = frozenset(),
    /,
    *,
    scaled: bool = True,
) -> Statistics:
    """Statistics of one group of task-stacked leaves ``[n, *shape]``, in one read of them.

    The Gram matrix takes no other. The cosine row sums take three more reads, the relative norms
    without a Gram matrix two, the other row sums one.

    Args:
        leaves: task-stacked tensors.
        active: the tasks that may get a weight.
        needs: names of the optional statistics to measure.
        scaled: False takes 1 for the scale, which is faster; where that overflows or vanishes, all
            tasks are marked as not finite.
    """
    with full_precision(leaves[0].device):
        if kernels := _kernels(leaves, needs):
            return _measure_fused(kernels, leaves, None, active, needs)
        if needs & OF_GRAMIAN:  # which tells all of the others too
            return _measure_gramian(leaves, active, needs, scaled=scaled)
        measured = _measure_row_sums(leaves, active, scaled=scaled)
        if "cosine_row_sums" in needs:
            cosines, nonzero = _cosine_row_sums(leaves)
            measured = measured._replace(cosine_row_sums=cosines, nonzero=nonzero)
        if "other_row_sums" in needs:
            others = _other_row_sums(leaves, measured.scale)
            measured = measured._replace(other_row_sums=others)
        if "relative_norms" in needs:
            units = row_magnitudes(leaves)
            lengths = scaled_square_sums(leaves, or_one(units)).sqrt()
            measured = measured._replace(relative_norms=_relative_norms(units, lengths, active))
        return measured


def _measure_row_sums(leaves: Sequence[Tensor], active: Tensor, *, scaled: bool) -> Statistics:
    """Row sums and norms, s = J (Jᵀ 1)."""
    dtype = accumulation_dtype(leaves)
    parts = [
        (size, *_measure_part(blocks)) for size, blocks in unit_parts(leaves, dtype, scaled=scaled)
    ]
    if not parts:
        zeros = active.new_zeros(active.shape, dtype=dtype)
        parts = [(zeros.new_zeros(()), zeros, zeros)]
    sizes, norms, dots = (torch.stack(column) for column in zip(*parts, strict=True))
    scale = or_one(sizes.amax())
    shares = (sizes / scale).unsqueeze(1)
    squared_norms = (shares * norms).square().sum(0)
    finite = torch.isfinite(norms).all(0)
    return Statistics(
        row_sums=(shares.square() * dots).sum(0),
        squared_norms=squared_norms,
        cosine_row_sums=None,
        finite=finite if scaled else finite & in_range(squared_norms.amax()),
        active=active,
        scale=scale,
    )


def _measure_gramian(
    leaves: Sequence[Tensor], active: Tensor, needs: frozenset[str], *, scaled: bool
) -> Statistics:
    """The Gram matrix, each task in units of its own, and all that follows from it."""
    units, products = _inner_products(leaves, scaled=scaled)
    statistics = _of_products(units, products, torch.finfo(products.dtype).eps, active, needs)
    if scaled:
        return statistics
    sound = in_range(diagonal(products)).all()  # a zero may be a square that vanished
    return statistics._replace(finite=statistics.finite & sound)


def _inner_products(leaves: Sequence[Tensor], *, scaled: bool) -> tuple[Tensor | None, Tensor]:
    """Units ``[n]`` and (g_i / unit_i) · (g_j / unit_j), in one read of the leaves.

    The units are powers of two, 0 for a zero signal; None, for 1, without scaling.
    """
    dtype = accumulation_dtype(leaves)
    units = leaves[0].new_zeros(leaves[0].shape[0], dtype=dtype)
    products = torch.outer(units, units)
    if not scaled:
        for block in blocks_of_all(leaves, dtype):
            products = torch.addmm(products, block, block.T)
        return None, products
    for scales, blocks in row_unit_parts(leaves, dtype):
        largest = torch.maximum(units, scales)
        before, now = units / or_one(largest), scales / or_one(largest)
        part = torch.stack([block @ block.T for block in blocks]).sum(0)
        products = products * torch.outer(before, before) + part * torch.outer(now, now)
        units = largest
    return units, products


def measure_groups(
    groups: Sequence[Sequence[Tensor]],
    active: Bool[Tensor, " n"],
    needs: frozenset[str] = frozenset(),
    /,
    *,
    scaled: bool = True,
) -> Statistics:
    """Statistics of several groups of leaves, one row each; the options are :func:`measure`'s."""
    leaves = [leaf for group in groups for leaf in group]
    if kernels := _kernels(leaves, needs):
        of_leaf = [index for index, group in enumerate(groups) for _ in group]
        with full_precision(leaves[0].device):
            return _measure_fused(kernels, leaves, of_leaf, active, needs)
    return _side_by_side([measure(group, active, needs, scaled=scaled) for group in groups], active)


def _side_by_side(each: Sequence[Statistics], active: Tensor) -> Statistics:
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
        cosines=_stack([s.cosines for s in each]),
        relative_norms=_stack([s.relative_norms for s in each]),
    )


def _kernels(leaves: Sequence[Tensor], needs: frozenset[str]) -> Any:
    """The fused kernels, if they can measure these leaves, else None."""
    return fused_kernels(leaves, gramian=bool(needs & (OF_GRAMIAN | OF_OTHERS)))


def _measure_fused(
    kernels: Any,
    leaves: Sequence[Tensor],
    groups: Sequence[int] | None,
    active: Tensor,
    needs: frozenset[str],
) -> Statistics:
    """Statistics by kernels that read all leaves in one launch, and scale them for nothing."""
    if needs & (OF_GRAMIAN | OF_OTHERS):
        units, products = kernels.inner_products(leaves, groups)
        eps = torch.finfo(products.dtype).eps
        if groups is None:
            statistics = _of_products(units, products, eps, active, needs)
        else:
            pairs = zip(units, products, strict=True)
            each = [_of_products(unit, product, eps, active, needs) for unit, product in pairs]
            statistics = _side_by_side(each, active)
        if needs & OF_GRAMIAN:
            return statistics
        return statistics._replace(gramian=None, cosines=None, relative_norms=None)
    sums = kernels.row_sums(leaves, groups)
    relative_norms = None
    if "relative_norms" in needs:
        units, lengths = (x.reshape(-1, *active.shape) for x in (sums.units, sums.lengths))
        rows = [_relative_norms(*pair, active) for pair in zip(units, lengths, strict=True)]
        relative_norms = torch.stack(rows).reshape(sums.units.shape)
    return Statistics(
        row_sums=sums.row_sums,
        squared_norms=sums.squared_norms,
        cosine_row_sums=None,
        finite=sums.finite if groups is None else sums.finite.all(0),
        active=active,
        scale=sums.scale,
        relative_norms=relative_norms,
    )


def from_gramian(gramian: Float[Tensor, "n n"], /) -> Statistics:
    """Statistics of n signals that are known by their inner products g_i · g_j alone.

    The scale is the largest norm, since no entry is known. Row sums made of the rounding of
    the dtype that was given, which may be half, are zero, those of the cosines too.
    """
    with full_precision(gramian.device):
        eps = torch.finfo(gramian.dtype).eps
        gramian = gramian.detach().to(accumulation_dtype([gramian]))
        active = torch.ones(len(gramian), dtype=torch.bool, device=gramian.device)
        units = diagonal(gramian).clamp(min=0).sqrt()
        products = gramian / or_one(units) / or_one(units).unsqueeze(1)
        return _of_products(units, products, eps, active, OF_GRAMIAN | OF_OTHERS)


def _of_products(
    units: Tensor | None, products: Tensor, eps: float, active: Tensor, needs: frozenset[str]
) -> Statistics:
    """Statistics of signals from their inner products, each signal in units of its own, or of 1.

    Row sums that may be made of products rounded to eps are zero.
    """
    lengths = diagonal(products).clamp(min=0).sqrt()
    scale, gramian = products.new_ones(()), products
    if units is not None:
        scale = or_one(units.nan_to_num(0.0, 0.0, 0.0).amax())
        shares = units / scale
        gramian = products * torch.outer(shares, shares)
    divisors = or_one(lengths)
    cosines = products / torch.outer(divisors, divisors)
    of_cosines, of_others = "cosine_row_sums" in needs, "other_row_sums" in needs
    squared_norms = diagonal(gramian)
    others = gramian - squared_norms.diag() if of_others else None
    return Statistics(
        row_sums=_row_sums(gramian, eps),
        squared_norms=squared_norms,
        cosine_row_sums=_row_sums(cosines, eps) if of_cosines else None,
        finite=torch.isfinite(lengths),
        active=active,
        scale=scale,
        gramian=gramian,
        other_row_sums=None if others is None else _row_sums(others, eps),
        nonzero=lengths != 0,
        cosines=cosines,
        relative_norms=_relative_norms(units, lengths, active),
    )


def _relative_norms(
    units: Float[Tensor, " n"] | None, lengths: Float[Tensor, " n"], active: Bool[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """unit_i · length_i over the median of those that count, the mean of the middle two.

    By ratios alone: the norms themselves may overflow, or vanish beside a larger one.
    """
    counted = active & (lengths != 0)
    places = counted.sum() + torch.arange(-1, 1, device=lengths.device)
    sizes = lengths if units is None else units.log2() + lengths.log2()
    order = sizes.masked_fill(~counted, torch.inf).argsort()
    middle = order[places.clamp(min=0) // 2]  # two, or one twice
    upper = middle[1:]
    norms = lengths / or_one(lengths[upper])
    if units is not None:
        norms = units / or_one(units[upper]) * norms
    return norms / or_one(norms[middle].mean())


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


def _cosine_row_sums(leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
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
