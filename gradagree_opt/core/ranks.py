"""Tasks that lie on several ranks: measured together, decided by the first, combined together.

One step, in this order on every rank, whatever the weighting; all-reduce is the only primitive:

1. header: how many tasks each rank has, what they look like, and whether a rank has failed;
2. Σ_j g_j, d numbers, and Σ_j u_j for cosines;
3. table: per task its norm and its products with these sums, so that every rank knows all tasks;
4. what the first rank has decided, so that no rounding and no draw of a rank's own comes in;
5. whether every rank could combine its own tasks, and to what shapes, two numbers a rank;
6. Σ_i w_i · direction_i, d numbers; 5 and 6 once more for the length that match_norm names.

The Gram matrix takes all rows in the place of step 2, N·d numbers, a block of columns at a time.
Conjugate gradients on J Jᵀ would take d numbers a step, about 70 steps to 1e-6 at a damping of
0.01: they would save nothing below as many tasks.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.blocks import or_one, power_of_two
from gradagree_opt.core.lost import backends
from gradagree_opt.core.messages import Messages
from gradagree_opt.core.own_part import Part, statistics_of
from gradagree_opt.core.results import Aggregation, Combine, Measured
from gradagree_opt.core.scopes import by_group
from gradagree_opt.core.shards import Shards, own_part
from gradagree_opt.core.stacks import (
    PyTree,
    accumulation_dtype,
    full_precision,
    leaves_of,
    like,
    mask_rows,
)
from gradagree_opt.core.statistics import OF_GRAMIAN, of_products, side_by_side
from gradagree_opt.core.summed import Summed

GATHERED_ENTRIES = 2**22
"""Entries of all tasks that are held at once for a Gram matrix: 16 MiB of float32."""


class Ranks(Messages):
    """The ranks of a process group as one: measured, decided and combined together."""

    def __init__(self, group: Any = None) -> None:
        super().__init__(group)
        self.shards = Shards((), group)

    def by_parts(
        self,
        directions: PyTree,
        signal: PyTree | None,
        aggregate: Callable[[PyTree, PyTree | None], Aggregation],
        /,
    ) -> Aggregation:
        """An aggregation of what this rank holds of each leaf; its update is sharded as they are.

        Raises:
            ValueError: DTensors lie on several meshes, or their parts are to be added.
        """
        shards = self.shards = Shards(leaves_of(directions), self.group)
        try:
            own = tree_map(own_part, directions)
            result = aggregate(own, None if signal is None else tree_map(own_part, signal))
        finally:
            self.shards = Shards((), self.group)
        whole = shards.whole(leaves_of(result.update))
        return result._replace(update=like(result.update, whole))

    def name(self, tasks: Sequence[int], /) -> str:
        """Tasks that are counted over all ranks, by their numbers on their own: "1 of rank 2"."""
        names = []
        for rank, count in enumerate(self.counts):
            start = sum(self.counts[:rank])
            own = [task - start for task in tasks if start <= task < start + count]
            names += [f"{task} of rank {rank}" for task in own]
        return ", ".join(names)

    def measure(
        self,
        leaves: Sequence[Float[Tensor, "n ..."]],
        groups: list[int] | None,
        needs: frozenset[str],
        /,
        *,
        nonfinite: Bool[Tensor, " n"] | None,
        drop: bool,
        draw: Callable[[int], Tensor | None],
        options: Sequence[str],
    ) -> Measured:
        """Statistics of the tasks of all ranks, from the signals of this one's.

        Args:
            leaves: of the task-stacked signal of this rank; zeros for the tasks that are dropped.
            groups: the group of every leaf, or None.
            needs: names of the optional statistics.
            nonfinite: this rank's tasks that are known to be so.
            drop: whether these get weight 0.
            draw: gives as many random numbers as there are tasks; those of the first rank count.
            options: what has to be the same on all ranks, in words; last the names of the leaves.

        Raises:
            ValueError: another rank has failed, or has other shapes or options.
        """
        with full_precision(leaves[0].device):
            own = self._join(leaves, options)
            n = sum(self.counts)
            if n == 0:
                raise ValueError(
                    "expected at least one task, found none on any rank; skip the step when the "
                    "batch has no tasks"
                )
            none = torch.zeros(len(leaves[0]), dtype=torch.bool, device=leaves[0].device)
            known = none if nonfinite is None else nonfinite
            if self.shards:  # of which another rank may hold the part with the NaN
                known = self.shards.sum(known.int()) > 0
                leaves = mask_rows([*leaves], ~known) if drop else leaves
            members = by_group(self.shards.counted(leaves), groups)
            parts = [Part.of(member) for member in members]
            self.shards.unify(parts)
            gathers = bool(needs & OF_GRAMIAN)
            counts = float(not self.shards.index)  # products are added up over the parts
            columns = [[part.units * counts, part.lengths * counts] for part in parts]
            if not gathers:
                for column, told in zip(columns, self._products(parts, needs), strict=True):
                    column += told
            table = [known, none, *(each for column in columns for each in column)]
            draws = draw(n) if "draws" in needs else None
            rows = self.table(torch.stack([each.double() for each in table], 1), own, n, draws)
            bad, draws_of_first, *rest = rows.to(accumulation_dtype(leaves)).unbind(1)
            known_bad = bad != 0
            active = ~known_bad if drop else torch.ones_like(known_bad)
            width = len(columns[0])
            each = []
            for index, part in enumerate(parts):
                told_of = rest[index * width : (index + 1) * width]
                if gathers:
                    products = self._inner_products(part, told_of[0], own)
                    eps = torch.finfo(products.dtype).eps
                    each.append(of_products(told_of[0], products, eps, active, needs))
                else:
                    each.append(statistics_of(told_of, part.total_unit, active, needs))
            statistics = each[0] if groups is None else side_by_side(each, active)
            if draws is not None:
                statistics = statistics._replace(draws=draws_of_first)
            return Measured(statistics, known_bad | ~statistics.finite, groups, True, own)

    def summed(self, combine_directions: Combine, own: slice, /) -> Summed:
        """Σ_i w_i · direction_i over the tasks of all ranks, from this one's."""
        return Summed(self, combine_directions, own)

    def decided(
        self, decide: Callable[[], list[Tensor]], own: slice, apart: bool, /
    ) -> tuple[list[Tensor], bool]:
        """What the first rank has decided, on every rank, and whether the directions are no signal.

        Args:
            decide: gives weights and what else is decided, the same number of tensors on all ranks.
            own: the place of this rank's tasks; without any it has no form of its own.
            apart: whether this rank's directions are others than its signals.

        Raises:
            ValueError: the weighting has failed on another rank, or one has directions of its own
                and another does not.
        """
        parts, error = [], None
        try:
            parts = decide()
        except Exception as raised:
            error = raised
        form = 0 if own.start == own.stop else 1 + apart
        forms = self.agree(error, form)
        if len(set(forms) - {0}) > 1:
            raise ValueError(
                "expected tasks of one form on all ranks, found signals beside the directions on "
                f"some alone; call the aggregation in the same way on every rank (found {forms})"
            )
        told = self.of_first(torch.cat([part.flatten().double() for part in parts]))
        pieces = zip(torch.split(told, [part.numel() for part in parts]), parts, strict=True)
        return [piece.reshape(part.shape).to(part.dtype) for piece, part in pieces], 2 in forms

    def _join(self, leaves: Sequence[Tensor], options: Sequence[str]) -> slice:
        """The place of this rank's tasks among all, once all have the same to do."""
        here, served = leaves[0].device.type, backends(self.group)
        if here not in served:
            raise ValueError(
                f"expected tensors on a device that the process group serves, {' or '.join(served)}"
                f", found {here}; move the model there, or begin with "
                "init_process_group('cpu:gloo,cuda:nccl')"
            )
        n = len(leaves[0])
        names = options[len(options) - len(leaves) :]
        # Without the addresses of functions, and the lines of tensors.
        words = [re.sub(r" at 0x[0-9a-f]+|\s*\n", "", option) for option in options]
        shapes = self.shards.shapes(leaves)
        words += [
            f"{str(leaf.dtype).removeprefix('torch.')} {list(shape)} of {name!r}"
            for name, leaf, shape in zip(names, leaves, shapes, strict=True)
        ]
        d = sum(torch.Size(shape).numel() for shape in shapes)
        digest = zlib.crc32("\n".join(words).encode())
        table = self.tell(n, d, digest, self.shards.block, self.shards.index, failed=False)
        self.check_none([rank for rank, row in enumerate(table) if row[3]])
        if any(row[1:3] != table[0][1:3] for row in table):
            raise ValueError(
                "expected the same parameters and options of the aggregator on all ranks, found "
                f"{self.differences(words)}; build model and aggregator alike on every rank"
            )
        places = [(row[0], row[4], row[5]) for row in table]
        self.counts = self.shards.meet(places, self.groups)
        self.indices = [row[5] for row in table]
        start = sum(self.counts[: self.shards.first(places, self.rank)])
        return slice(start, start + n)

    def _products(
        self, parts: Sequence[Part], needs: frozenset[str]
    ) -> list[list[Float[Tensor, " n"]]]:
        """Products of each task with Σ g_j, in their units, then those that are asked for."""
        others, cosine = "other_row_sums" in needs, "cosine_row_sums" in needs
        wide = torch.float64
        if not others and all(part.dtype == torch.float32 for part in parts):
            wide = torch.float32
        sums = [part.sum(wide) for part in parts]
        units = [part.unit_sum().to(wide) for part in parts] if cosine else []
        flat = torch.cat([*sums, *units])
        self.shards.add_up(flat)
        totals = torch.split(flat, [len(each) for each in [*sums, *units]])
        results = []
        for index, part in enumerate(parts):
            total = totals[index]
            largest = torch.cat([total.abs(), total.new_zeros(1)]).amax()
            largest = self.shards.largest(largest.nan_to_num(0.0, 0.0, 0.0))
            part.total_unit = power_of_two(largest)
            total = total / or_one(part.total_unit)
            each = [part.times(total.to(part.dtype))]
            if cosine:
                shares = or_one(part.lengths).reciprocal()
                each.append(shares * part.times(totals[len(parts) + index].to(part.dtype)))
            if others:
                each.append(part.times_others(total))
            results.append(each)
        return results

    def _inner_products(self, part: Part, units: Tensor, own: slice) -> Float[Tensor, "n n"]:
        """(g_i / unit_i) · (g_j / unit_j) of the tasks of all ranks, by blocks of columns."""
        n = len(units)
        products = units.new_zeros(n, n)
        for block in part.chunks(max(1, GATHERED_ENTRIES // n)):
            matrix = units.new_zeros(n, block.shape[1])
            matrix[own] = block.to(units.dtype)
            self.shards.add_up(matrix)
            products = torch.addmm(products, matrix, matrix.T)
        return self.of_first(self.shards.sum(products))
