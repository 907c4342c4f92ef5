"""The tasks of one rank: their units and norms, and their products with sums over all ranks."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.blocks import column_blocks, or_one, power_of_two, rows
from gradagree_opt.core.stacks import row_magnitudes, scaled_square_sums
from gradagree_opt.core.statistics import Statistics, relative_norms_of


class Part:
    """The leaves of one group on this rank, and the unit, a power of two, of every task in it."""

    def __init__(self, leaves: Sequence[Tensor], units: Tensor, lengths: Tensor) -> None:
        self.leaves = leaves
        self.units = units
        self.lengths = lengths
        self.dtype = units.dtype
        self.total_unit = units.new_ones(())

    @classmethod
    def of(cls, leaves: Sequence[Tensor]) -> "Part":
        units = power_of_two(row_magnitudes(leaves).nan_to_num(0.0, 0.0, 0.0))
        return cls(leaves, units, scaled_square_sums(leaves, or_one(units)).sqrt())

    def sum(self, dtype: torch.dtype) -> Float[Tensor, " d"]:
        """Σ_j g_j."""
        sums = [rows(leaf).sum(0, dtype=dtype) for leaf in self.leaves]
        return torch.cat([self.units.new_zeros(0, dtype=dtype), *sums])

    def unit_sum(self) -> Float[Tensor, " d"]:
        """Σ_j g_j / ‖g_j‖."""
        shares = or_one(self.lengths).reciprocal()
        return torch.cat([self.units.new_zeros(0), *(shares @ block for block in self._blocks())])

    def products(
        self,
        totals: Sequence[Tensor],
        needs: frozenset[str],
        largest: Callable[[Tensor], Tensor],
    ) -> list[Float[Tensor, " n"]]:
        """g_i · Σ_j g_j of each task, in the units of both, then the products that are asked for.

        Args:
            totals: Σ_j g_j and, for cosines, Σ_j u_j over all ranks.
            needs: of the weightings.
            largest: takes the maximum over the ranks that hold the other parts.
        """
        total = totals[0]
        size = torch.cat([total.abs(), total.new_zeros(1)]).amax()
        self.total_unit = power_of_two(largest(size.nan_to_num(0.0, 0.0, 0.0)))
        total = total / or_one(self.total_unit)
        found = [self.times(total.to(self.dtype))]
        if "cosine_row_sums" in needs:
            found.append(or_one(self.lengths).reciprocal() * self.times(totals[1].to(self.dtype)))
        if "other_row_sums" in needs:
            found.append(self.times_others(total))
        return found

    def times(self, vector: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
        """(g_i / unit_i) · vector."""
        result, at = torch.zeros_like(self.units), 0
        for block in self._blocks():
            result = result + block @ vector[at : at + block.shape[1]]
            at += block.shape[1]
        return result

    def times_others(self, total: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
        """(g_i / unit_i) · (Σ_{j≠i} g_j / base_i), in float64; total is in its unit."""
        units, whole = self.units.double(), self.total_unit.double()
        base = base_of(units, whole)
        shares = (or_one(units) / base).unsqueeze(1)
        whole_shares = (or_one(whole) / base).unsqueeze(1)
        result, at = torch.zeros_like(units), 0
        for block in self._blocks(torch.float64):
            rest = total[at : at + block.shape[1]] * whole_shares - block * shares
            result = result + (block * rest).sum(1)
            at += block.shape[1]
        return result

    def chunks(self, width: int) -> Iterator[Float[Tensor, "n columns"]]:
        """The rows in their units, ``width`` columns at a time; the last ones may be fewer."""
        held: list[Tensor] = []
        room = width
        for leaf in self.leaves:
            for piece in torch.split(rows(leaf), width, 1):
                while piece.shape[1]:
                    taken, piece = piece[:, :room], piece[:, room:]
                    held.append(taken.to(self.dtype) / or_one(self.units).unsqueeze(1))
                    room -= taken.shape[1]
                    if not room:
                        yield torch.cat(held, 1)
                        held, room = [], width
        if held:
            yield torch.cat(held, 1)

    def _blocks(self, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        dtype = dtype or self.dtype
        units = or_one(self.units).unsqueeze(1).to(dtype)
        for leaf in self.leaves:
            if len(leaf):
                yield from (block / units for block in column_blocks(leaf, dtype))
            else:
                yield rows(leaf).to(dtype)


def base_of(units: Float[Tensor, " n"], total_unit: Float[Tensor, ""]) -> Float[Tensor, " n"]:
    """Units of Σ_{j≠i} g_j = Σ_j g_j − g_i: the larger one of the two, where Σ_j g_j may be 0."""
    return or_one(torch.maximum(units, total_unit.to(units)))


def statistics_of(
    told: Sequence[Float[Tensor, " n"]],
    total_unit: Float[Tensor, ""],
    active: Bool[Tensor, " n"],
    needs: frozenset[str],
) -> Statistics:
    """Statistics of one group from its tasks' columns: unit, length, products in these units."""
    units, lengths, dots, *rest = told
    scale = or_one(units.amax())
    shares, total_share = units / scale, total_unit.to(units) / scale
    cosine = rest.pop(0) if "cosine_row_sums" in needs else None
    others = None
    if "other_row_sums" in needs:
        others = rest.pop(0) * shares * (base_of(units, total_unit) / scale)
    return Statistics(
        row_sums=dots * shares * total_share,
        squared_norms=(shares * lengths).square(),
        cosine_row_sums=cosine,
        finite=torch.isfinite(lengths),
        active=active,
        scale=scale,
        other_row_sums=others,
        nonzero=lengths != 0 if cosine is not None else None,
        relative_norms=relative_norms_of(units, lengths, active)
        if "relative_norms" in needs
        else None,
    )
