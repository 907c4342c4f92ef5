"""Measure: the statistics of a task-stacked pytree of signals, in one read of them.

Every sum is kept in float32 or better and in units of the largest entry, so that entries from
1e-30 to 1e30 neither overflow nor vanish. The N×N Gram matrix is formed for the weightings that
ask for it and no others: s = J (Jᵀ 1).
"""

from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradagree_opt.annotations import Bool
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
from gradagree_opt.core.statistics import (
    OF_GRAMIAN,
    OF_OTHERS,
    Statistics,
    of_products,
    relative_norms_of,
    side_by_side,
)


def measure(
    leaves: Sequence[Tensor],
    active: Bool[Tensor, " n"],
    needs: frozenset[str] = frozenset(),
    /,
    *,
    scaled: bool = True,
) -> Statistics:
    """Statistics of one group of task-stacked leaves ``[n, *shape]``, in one read of them.

    The Gram matrix needs no further read; the cosine row sums take three more, the relative norms
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
            measured = measured._replace(relative_norms=relative_norms_of(units, lengths, active))
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
    statistics = of_products(units, products, torch.finfo(products.dtype).eps, active, needs)
    if scaled:
        return statistics
    sound = in_range(diagonal(products)).all()  # a zero may be a square that vanished
    return statistics._replace(finite=sound.expand_as(active))


def _inner_products(leaves: Sequence[Tensor], *, scaled: bool) -> tuple[Tensor | None, Tensor]:
    """Units ``[n]`` and (g_i / unit_i) · (g_j / unit_j), in one read of the leaves.

    The units are powers of two, 0 for a zero signal; None, for 1, without scaling.
    """
    dtype, n = accumulation_dtype(leaves), leaves[0].shape[0]
    if not scaled:
        total = None
        for block in blocks_of_all(leaves, dtype):
            total = block @ block.T if total is None else total.addmm_(block, block.T)
        return None, leaves[0].new_zeros(n, n, dtype=dtype) if total is None else total
    units = leaves[0].new_zeros(n, dtype=dtype)
    products = torch.outer(units, units)
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
    return side_by_side([measure(group, active, needs, scaled=scaled) for group in groups], active)


def _kernels(leaves: Sequence[Tensor], needs: frozenset[str]) -> ModuleType | None:
    """The fused kernels, if they can measure these leaves, else None."""
    return fused_kernels(leaves, gramian=bool(needs & (OF_GRAMIAN | OF_OTHERS)))


def _measure_fused(
    kernels: ModuleType,
    leaves: Sequence[Tensor],
    groups: Sequence[int] | None,
    active: Tensor,
    needs: frozenset[str],
) -> Statistics:
    """Statistics by kernels that read all leaves in one launch, and scale them at no cost."""
    if needs & (OF_GRAMIAN | OF_OTHERS):
        units, products = kernels.inner_products(leaves, groups)
        eps = torch.finfo(products.dtype).eps
        if groups is None:
            statistics = of_products(units, products, eps, active, needs)
        else:
            pairs = zip(units, products, strict=True)
            each = [of_products(unit, product, eps, active, needs) for unit, product in pairs]
            statistics = side_by_side(each, active)
        if needs & OF_GRAMIAN:
            return statistics
        return statistics._replace(gramian=None, cosines=None, relative_norms=None)
    sums = kernels.row_sums(leaves, groups)
    relative_norms = None
    if "relative_norms" in needs:
        units, lengths = (x.reshape(-1, *active.shape) for x in (sums.units, sums.lengths))
        rows = [relative_norms_of(*pair, active) for pair in zip(units, lengths, strict=True)]
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
