"""The few numbers that weightings need of n signals, and what follows from their Gram matrix."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.positive_definite import diagonal
from gradagree_opt.core.stacks import accumulation_dtype, full_precision


class Statistics(NamedTuple):
    """What is known of the signals g_i of n tasks; one row for each group of leaves, if grouped.

    Attributes:
        row_sums: s_i = g_i · Σ_j g_j, in units of scale² (Eshratifar et al. 2018, algorithm 1).
        squared_norms: ‖g_i‖², in units of scale²; None from an engine that forms no gradient of a
            single task; a weighting that needs them is never given those.
        other_row_sums: Σ_{j≠i} g_i · g_j, in units of scale², or None where no weighting asked for
            it: beside a task far larger than the others, s_i − ‖g_i‖² would be rounding error.
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
"""The statistics that need the Gram matrix; the relative norms come with it."""
OF_OTHERS = frozenset({"cosine_row_sums", "other_row_sums"})
"""The statistics that follow from the Gram matrix too, if a weighting asks for them."""


def side_by_side(each: Sequence[Statistics], active: Tensor) -> Statistics:
    """Statistics of several groups of leaves as rows of one."""
    rows = Statistics(*(_stack(values) for values in zip(*each, strict=True)))
    return rows._replace(finite=rows.finite.all(0), active=active)


def from_gramian(gramian: Float[Tensor, "n n"], /) -> Statistics:
    """Statistics of n signals that are known by their inner products g_i · g_j alone.

    The scale is the largest norm, since no entry is known. Row sums, those of the cosines too, are
    zero if they may be rounding errors of the given dtype, which may be half precision.
    """
    with full_precision(gramian.device):
        eps = torch.finfo(gramian.dtype).eps
        gramian = gramian.detach().to(accumulation_dtype([gramian]))
        active = torch.ones(len(gramian), dtype=torch.bool, device=gramian.device)
        units = diagonal(gramian).clamp(min=0).sqrt()
        products = gramian / or_one(units) / or_one(units).unsqueeze(1)
        return of_products(units, products, eps, active, OF_GRAMIAN | OF_OTHERS)


def of_products(
    units: Tensor | None, products: Tensor, eps: float, active: Tensor, needs: frozenset[str]
) -> Statistics:
    """Statistics of signals from their inner products, each signal in units of its own, or of 1.

    Row sums are zero if they may be rounding errors of products that are right to eps.
    """
    squared_norms = diagonal(products).clamp(min=0)
    lengths = squared_norms.sqrt()
    scale, gramian = products.new_ones(()), products
    if units is not None:
        scale = or_one(units.nan_to_num(0.0, 0.0, 0.0).amax())
        shares = units / scale
        gramian = products * torch.outer(shares, shares)
        squared_norms = diagonal(gramian)
    divisors = or_one(lengths)
    cosines = products / torch.outer(divisors, divisors)
    of_cosines, of_others = "cosine_row_sums" in needs, "other_row_sums" in needs
    others = gramian - squared_norms.diag() if of_others else None
    return Statistics(
        row_sums=_row_sums(gramian, eps),
        squared_norms=squared_norms,
        cosine_row_sums=_row_sums(cosines, eps) if of_cosines else None,
        finite=lengths < torch.inf,
        active=active,
        scale=scale,
        gramian=gramian,
        other_row_sums=None if others is None else _row_sums(others, eps),
        nonzero=lengths != 0,
        cosines=cosines,
        relative_norms=relative_norms_of(units, lengths, active),
    )


def relative_norms_of(
    units: Float[Tensor, " n"] | None, lengths: Float[Tensor, " n"], active: Bool[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """unit_i · length_i over the median of those that count, the mean of the middle two.

    By ratios alone: the norms themselves may overflow, or vanish beside a larger one.
    """
    counted = active & (lengths != 0)
    # If none counts: the last and the first, both infinite, so that all ratios are 0.
    places = (counted.sum() + torch.arange(-1, 1, device=lengths.device)) // 2
    if units is None:  # of lengths in range
        ordered = lengths.masked_fill(~counted, torch.inf).sort().values
        return lengths / ordered[places].mean()
    sizes = units.log2() + lengths.log2()
    order = sizes.masked_fill(~counted, torch.inf).argsort()
    middle = order[places]  # two, or one twice
    upper = middle[1:]
    norms = units / or_one(units[upper]) * (lengths / or_one(lengths[upper]))
    return norms / or_one(norms[middle].mean())


def _row_sums(matrix: Tensor, eps: float) -> Tensor:
    """The sums of the rows; all zero if they may be rounding errors of entries right to eps."""
    sums = matrix.sum(1)
    rounding = 8 * eps * torch.linalg.vector_norm(matrix, dim=1).sum()
    return sums.masked_fill(torch.linalg.vector_norm(sums, ord=1, dim=0) <= rounding, 0)


def _stack(values: Sequence[Tensor | None]) -> Any:
    """The values of all groups, or None where they were not measured."""
    measured = [value for value in values if value is not None]
    return torch.stack(measured) if measured else None
