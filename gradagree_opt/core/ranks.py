"""Tasks that lie on several ranks: measured together, decided alike, combined together.

One step, in this order on every rank, whatever the weighting; all-reduce is the only primitive:

1. header: how many tasks each rank has, what they look like, and whether a rank has failed;
2. Σ_j g_j, d numbers, and Σ_j u_j for cosines;
3. table: per task its norm and its products with these sums, so that every rank knows all tasks,
   and decides on all by itself;
4. update: Σ_i w_i · direction_i, d numbers, after a report of each rank: whether it has failed
   since, a checksum of the weights that it used, and which parameters its tasks use. match_norm
   needs a second such sum, unless 2 gave the length. With equal weights 2 is the update: it carries
   the reports, and 4 is left out.

Ranks that round differently, or whose weighting draws random numbers, might decide differently. The
first rank's decision is then sent to all between 3 and 4, as are its Gram matrix and its factor of
match_norm where there are any. Where each rank holds a part of the parameters, the reports of 4 go
to all ranks and its numbers to those with the same part.

For a Gram matrix, 2 sends all rows in place of their sum: N·d numbers, by blocks of columns.
Conjugate gradients on J Jᵀ would send d numbers a step, in about 70 steps to 1e-6 at a damping of
0.01: with fewer tasks than that they would save nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.header import Header, check_alike, digest, words_of
from gradagree_opt.core.lost import backends
from gradagree_opt.core.messages import Messages
from gradagree_opt.core.own_part import Part, statistics_of
from gradagree_opt.core.results import Aggregation, Measured
from gradagree_opt.core.rounding import rounding_of
from gradagree_opt.core.scopes import by_group
from gradagree_opt.core.shards import Shards, local_part
from gradagree_opt.core.stacks import (
    PyTree,
    accumulation_dtype,
    full_precision,
    leaves_of,
    like,
    mask_rows,
)
from gradagree_opt.core.statistics import OF_GRAMIAN, Statistics, of_products, side_by_side
from gradagree_opt.core.weightings import Need, UniformWeighting, Weigh, draws_itself, needs_of

GATHERED_ENTRIES = 2**22
"""Entries of all tasks that are held at once for a Gram matrix: 16 MiB of float32."""


class Ranks(Messages):
    """A process group that measures, decides and combines as one process would.

    Attributes:
        shards: how the tensors of an aggregation lie in parts on several ranks, if they do.
        layout: shapes and dtypes of the leaves of the update, as far as this rank holds them.
    """

    def __init__(self, group: Any = None) -> None:
        super().__init__(group)
        self.shards = Shards((), group)
        self.layout: list[tuple[torch.Size, torch.dtype]] = []

    def by_parts(
        self,
        directions: PyTree,
        signal: PyTree | None,
        aggregate: Callable[[PyTree, PyTree | None], Aggregation],
        /,
    ) -> Aggregation:
        """Aggregates the parts of the leaves that this rank holds; the update is sharded like them.

        Raises:
            ValueError: DTensors lie on several meshes, or their parts are to be added.
        """
        shards = self.shards = Shards(leaves_of(directions), self.group)
        try:
            own = tree_map(local_part, directions)
            result = aggregate(own, None if signal is None else tree_map(local_part, signal))
        finally:
            self.shards = Shards((), self.group)
        whole = shards.whole(leaves_of(result.update))
        return result._replace(update=like(result.update, whole))

    def name(self, tasks: Sequence[int], /) -> str:
        """Names tasks, numbered over all ranks, by their ranks and numbers there: "1 of rank 2"."""
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
        weightings: Sequence[Weigh],
        /,
        *,
        directions: Sequence[Tensor] | None,
        nonfinite: Bool[Tensor, " n"] | None,
        drop: bool,
        draw: Callable[[int], Tensor | None],
        options: Sequence[str],
    ) -> Measured:
        """Statistics of the tasks of all ranks, from the signals of this one's.

        Args:
            leaves: of the task-stacked signal of this rank; zeros for the tasks that are dropped.
            groups: the group of every leaf, or None.
            weightings: that of the update, and that of match_norm where there is one.
            directions: of the shapes and dtypes of what is combined; None for those of the signal.
            nonfinite: this rank's tasks that are known to be so.
            drop: whether these get weight 0.
            draw: from the number of tasks to random numbers, of which the first rank's are used.
            options: descriptions of all that has to be the same on every rank; last the names of
                the leaves.

        Raises:
            ValueError: another rank has failed, or has other shapes or options.
        """
        needs = frozenset[Need]().union(*map(needs_of, weightings))
        with full_precision(leaves[0].device):
            own, apart = self._join(leaves, directions, weightings, options)
            known, parts = self._parts(leaves, groups, nonfinite, drop)
            equal = [isinstance(each, UniformWeighting) for each in weightings]
            is_update = all(equal) and groups is None and not (apart or self.shards)
            gathers = bool(needs & OF_GRAMIAN)
            totals = [] if gathers else self._totals(parts, needs, is_update)
            total_norm = None
            if totals and equal[1:] == [True] and not apart:
                total_norm = self.shards.norm(totals[: len(parts)]).to(parts[0].dtype)
            draws = draw(sum(self.counts)) if "draws" in needs else None
            marks, first_draws, columns = self._columns(parts, totals, needs, known, own, draws)
            known_bad = marks != 0
            active = ~known_bad if drop else torch.ones_like(known_bad)
            each = []
            for part, told in zip(parts, columns, strict=True):
                if gathers:
                    products = self._inner_products(part, told[0], own)
                    eps = torch.finfo(products.dtype).eps
                    each.append(of_products(told[0], products, eps, active, needs))
                else:
                    each.append(statistics_of(told, part.total_unit, active, needs))
            statistics = each[0] if groups is None else side_by_side(each, active)
            if draws is not None:
                statistics = statistics._replace(draws=first_draws)
            self._expect(statistics, len(equal), len(equal) - (total_norm is not None) - is_update)
            bad, total = known_bad | ~statistics.finite, totals[0] if is_update else None
            measured = Measured(statistics, bad, groups, signal_is_direction=not apart, own=own)
            return measured._replace(total_norm=total_norm, total=total)

    def decided(self, parts: list[Tensor], /) -> list[Tensor]:
        """The decision for all ranks: this one's own or, where ranks are unlike, the first one's.

        Args:
            parts: the tensors of this rank's decision, of the same shapes on all ranks.

        Raises:
            ValueError: the weighting has failed on another rank, where they are unlike.
        """
        if self.alike:
            return parts
        flat = [part.flatten().double() for part in parts]
        told = self.send([torch.zeros_like(part) for part in flat] if self.rank else flat)
        pieces = zip(torch.split(told, [part.numel() for part in parts]), parts, strict=True)
        return [piece.reshape(part.shape).to(part.dtype) for piece, part in pieces]

    def _join(
        self,
        leaves: Sequence[Tensor],
        directions: Sequence[Tensor] | None,
        weightings: Sequence[Weigh],
        options: Sequence[str],
    ) -> tuple[slice, bool]:
        """Where this rank's tasks are among all, and whether directions come beside the signals."""
        device = leaves[0].device
        served = backends(self.group)
        if device.type not in served:
            raise ValueError(
                f"expected tensors on a device that the process group serves, {' or '.join(served)}"
                f", found {device.type}; move the model there, or begin with "
                "init_process_group('cpu:gloo,cuda:nccl')"
            )
        n, shapes = len(leaves[0]), self.shards.shapes(leaves)
        words = words_of(leaves, shapes, options)
        combined = leaves if directions is None else directions
        self.layout = [(leaf.shape[1:], leaf.dtype) for leaf in combined]
        own = Header(
            n=n,
            d=sum(torch.Size(shape).numel() for shape in shapes),
            options=digest(words),
            form=0 if n == 0 else 1 if directions is None else 2,
            tasks=self.form,
            layout=digest((self.layout, len(self.flags()))),
            rounding=-1 - self.rank if draws_itself(weightings) else digest(rounding_of(device)),
            block=self.shards.block,
            part=self.shards.index,
        )
        table = self.tell(own)
        self.check_none([rank for rank, header in enumerate(table) if header.failed])
        check_alike(table, partial(self.differences, words))
        self.alike = len({header.rounding for header in table}) == 1
        self.counts = self.shards.meet(table, self.groups)
        if not sum(self.counts):
            raise ValueError(
                "expected at least one task, found none on any rank; skip the step when the batch "
                "has no tasks"
            )
        self.owing = True
        start = sum(self.counts[: self.shards.first(table, self.rank)])
        return slice(start, start + n), 2 in {header.form for header in table}

    def _expect(self, statistics: Statistics, decisions: int, updates: int) -> None:
        """Notes which messages follow the table, as vectors of zeros of their lengths."""
        self.owing = not updates  # with no message left, a failure is told by a word in the store
        sums, scale = statistics.row_sums, statistics.scale
        zero = sums.new_zeros((), dtype=torch.float64)
        decision = zero.expand(decisions * (2 * sums.numel() + scale.numel()))
        dtype = self.update_dtype
        d = 0 if self.shards else sum(shape.numel() for shape, _ in self.layout)
        self.due = [decision] * (not self.alike) + [zero.to(dtype).expand(d)] * updates

    @property
    def update_dtype(self) -> torch.dtype:
        """What directions are summed in: float32, or float64 where one of them has it."""
        wide = torch.float64 in (dtype for _, dtype in self.layout)
        return torch.float64 if wide else torch.float32

    def _parts(
        self, leaves: Sequence[Tensor], groups: list[int] | None, bad: Tensor | None, drop: bool
    ) -> tuple[Bool[Tensor, " n"], list[Part]]:
        """The tasks that are known to be non-finite, and one :class:`Part` for each group."""
        none = torch.zeros(len(leaves[0]), dtype=torch.bool, device=leaves[0].device)
        known = none if bad is None else bad
        if self.shards:  # another rank may hold the part with the NaN
            known = self.shards.sum(known.int()) > 0
            leaves = mask_rows([*leaves], ~known) if drop else leaves
        parts = [Part.of(member) for member in by_group(self.shards.counted(leaves), groups)]
        self.shards.unify(parts)
        return known, parts

    def _totals(
        self, parts: Sequence[Part], needs: frozenset[str], is_update: bool
    ) -> Sequence[Tensor]:
        """Σ_j g_j of every part, then Σ_j u_j of every one where cosines are asked for."""
        wide = torch.float64
        if "other_row_sums" not in needs and all(part.dtype == torch.float32 for part in parts):
            wide = torch.float32
        sums = [part.sum(wide) for part in parts]
        if "cosine_row_sums" in needs:
            sums += [part.unit_sum().to(wide) for part in parts]
        if is_update:
            total = self.send(sums)
            self.owing = True  # the table
            return [total]
        self.shards.add_up(flat := torch.cat(sums))
        return torch.split(flat, [len(each) for each in sums])

    def _columns(
        self,
        parts: Sequence[Part],
        totals: Sequence[Tensor],
        needs: frozenset[str],
        known: Tensor,
        own: slice,
        draws: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Sequence[Tensor]]]:
        """From all ranks: which tasks are bad, the draws, and the columns of every part."""
        counts = float(not self.shards.index)  # products are added up over the parts
        columns = [[part.units * counts, part.lengths * counts] for part in parts]
        for at, part in enumerate(parts if totals else []):
            columns[at] += part.products(totals[at :: len(parts)], needs, self.shards.largest)
        table = [known, torch.zeros_like(known), *chain(*columns)]
        rows = torch.stack([each.double() for each in table], 1)
        rows = self.table(rows, own, sum(self.counts), draws)
        dtype = accumulation_dtype([part.units for part in parts])
        marks, first_draws, *rest = rows.to(dtype).unbind(1)
        width = len(columns[0])
        return marks, first_draws, [rest[at : at + width] for at in range(0, len(rest), width)]

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
