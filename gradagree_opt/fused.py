"""Measure and apply in one launch each: a task stack on a GPU, read by kernels written in Triton.

A program reads blocks of columns of some leaves, each task in units of a power of two of its own,
and leaves its sums in a table that a second, small launch adds up, always in one order. Leaves are
found by a table of pointers. Nothing here waits for the device.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradagree_opt import fused_kernels as kernels
from gradagree_opt.annotations import Bool, Float

TILE = 8192
"""Entries that a program reads at a time: n tasks (up to a power of two) by the columns."""
COLUMNS = 1024
"""Columns of a tile, at most."""
WARPS = 4
PROGRAMS = 8
"""Programs to each multiprocessor, at most."""
GRAMIAN_PROGRAMS = 2
KINDS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Sums(NamedTuple):
    """Σ_j g_j's products and the norms of n tasks, one row for each group of leaves, if grouped.

    ``row_sums`` and ``squared_norms`` are in units of ``scale``², ``lengths`` of each task's unit.
    """

    row_sums: Float[Tensor, "*groups n"]
    squared_norms: Float[Tensor, "*groups n"]
    units: Float[Tensor, "*groups n"]
    lengths: Float[Tensor, "*groups n"]
    finite: Bool[Tensor, "*groups n"]
    scale: Float[Tensor, "*groups"]


def row_sums(leaves: Sequence[Tensor], groups: Sequence[int] | None = None, /) -> Sums:
    """Row sums and norms of task-stacked leaves, in one read of them.

    Args:
        leaves: task-stacked tensors of one device.
        groups: index of the group of every leaf, or None where there is one for all.
    """
    stack = _Stack(leaves, groups)
    plan, n, new = stack.plan, stack.n, stack.new
    parts = new(plan.programs * (1 + 3 * n))
    stack.launch(kernels.measure, parts)
    shape = stack.groups
    values, scale = new(4, *shape, n), new(*shape)
    finite = torch.empty(*shape, n, dtype=torch.bool, device=parts.device)
    rows = min(32, stack.rows)
    kernels.finish[plan.groups, triton.cdiv(n, rows)](
        parts, plan.ranges, values, scale, finite, n, plan.programs, len(plan.kinds),
        ROWS=rows, PARTS=max(1, 2048 // rows),
    )  # fmt: skip
    sums, squares, units, lengths = values.unbind()
    return Sums(sums, squares, units, lengths, finite, scale)


def inner_products(
    leaves: Sequence[Tensor], groups: Sequence[int] | None = None, /
) -> tuple[Float[Tensor, "*groups n"], Float[Tensor, "*groups n n"]]:
    """Units of the tasks and (g_i / unit_i) · (g_j / unit_j), in one read of the leaves.

    The units are powers of two, 0 for a zero signal; the arguments are those of :func:`row_sums`.
    """
    stack = _Stack(leaves, groups, least=16, programs=GRAMIAN_PROGRAMS)
    plan, n, new = stack.plan, stack.n, stack.new
    parts = new(plan.programs * n * (1 + n))
    stack.launch(kernels.measure_products, parts)
    units, products = new(*stack.groups, n), new(*stack.groups, n, n)
    kernels.finish_products[plan.groups, n](
        parts, plan.ranges, units, products, n, plan.programs, len(plan.kinds),
        ROWS=stack.rows, PARTS=max(1, 2048 // stack.rows),
    )  # fmt: skip
    return units, products


def combine(
    leaves: Sequence[Tensor],
    weights: Float[Tensor, "*groups n"],
    groups: Sequence[int] | None = None,
    /,
) -> tuple[list[Tensor], Float[Tensor, ""]]:
    """Σ_i w_i · row i for every leaf, in the leaf's own dtype, and the norm over all of them.

    Args:
        leaves: task-stacked tensors of one device.
        weights: ``[n]``, or ``[groups, n]`` with the group of every leaf in ``groups``.
        groups: index of the group of every leaf, or None where there is one for all.
    """
    stack = _Stack(leaves, groups)
    plan, new = stack.plan, stack.new
    sums = [torch.empty(leaf.shape[1:], dtype=leaf.dtype, device=leaf.device) for leaf in leaves]
    parts, norm = new(2 * plan.programs), new()
    outs = _table(tuple(map(Tensor.data_ptr, sums)), *stack.place)
    stack.launch(kernels.apply, parts, outs, weights.contiguous())
    kernels.finish_norm[(1,)](parts, norm, plan.programs, PARTS=1024)
    return sums, norm


class _Plan(NamedTuple):
    """What the programs of a launch read, for leaves of certain shapes.

    Attributes:
        layouts: of every leaf the strides of rows and columns, and its group.
        segments: leaf, first and last column of every piece that a program reads.
        firsts: first segment of every program, and their number.
        ranges: of every group and dtype the first program and the last.
        kinds: of every dtype its first program and how many there are.
    """

    layouts: Tensor
    segments: Tensor
    firsts: Tensor
    ranges: Tensor
    kinds: tuple[tuple[torch.dtype, int, int], ...]
    programs: int
    groups: int
    columns: int


class _Stack:
    """Task-stacked leaves as the kernels take them."""

    def __init__(
        self,
        leaves: Sequence[Tensor],
        groups: Sequence[int] | None,
        *,
        least: int = 1,
        programs: int = PROGRAMS,
    ) -> None:
        self.n = n = int(leaves[0].shape[0])
        device = leaves[0].device
        self.place = device, _stream(device)
        self.rows = max(least, triton.next_power_of_2(n))
        self.matrices = [leaf if leaf.is_contiguous() else _matrix(leaf) for leaf in leaves]
        layouts = tuple(map(_layout, self.matrices))
        kinds = tuple([leaf.dtype for leaf in leaves])
        self.groups = () if groups is None else (max(groups) + 1,)
        self.plan = _plan(
            layouts, kinds, None if groups is None else tuple(groups), self.rows, programs, device
        )
        self.dtype = torch.float64 if torch.float64 in kinds else torch.float32
        self.pointers = _table(tuple(map(Tensor.data_ptr, self.matrices)), *self.place)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.place[0])

    def launch(self, kernel: Any, parts: Tensor, *others: Tensor) -> None:
        """Reads the leaves, those of one dtype at a time."""
        plan = self.plan
        for kind, first, count in plan.kinds:
            if count:
                kernel[(count,)](
                    self.pointers, plan.layouts, plan.segments, plan.firsts, parts, *others,
                    self.n, first, plan.programs, KIND=KINDS[kind], ROWS=self.rows,
                    COLUMNS=plan.columns, num_warps=WARPS,
                )  # fmt: skip


def _matrix(leaf: Tensor) -> Tensor:
    return leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1)


def _layout(leaf: Tensor) -> tuple[int, int, int]:
    """Columns, and the strides of rows and columns."""
    if leaf.is_contiguous():
        width = leaf.numel() // leaf.shape[0]
        return width, width, 1
    row, column = leaf.stride()
    return leaf.shape[1], row, column


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=256)
def _table(numbers: tuple[int, ...], device: torch.device, _: int) -> Tensor:
    """The numbers on the device, for one stream: copied once, where memory is used again."""
    return _on_device(numbers, device)


def _on_device(numbers: Any, device: torch.device) -> Tensor:
    pinned = device.type == "cuda"
    table = torch.tensor(numbers, dtype=torch.int64, pin_memory=pinned)
    return table.to(device, non_blocking=True)


@lru_cache(maxsize=256)
def _plan(
    layouts: tuple[tuple[int, int, int], ...],
    kinds: tuple[torch.dtype, ...],
    groups: tuple[int, ...] | None,
    rows: int,
    programs: int,
    device: torch.device,
) -> _Plan:
    columns = min(COLUMNS, max(8, TILE // rows))
    of_leaf = groups or (0,) * len(layouts)
    number = max(of_leaf) + 1
    blocks = [triton.cdiv(width, columns) for width, _, _ in layouts]
    limit = programs * _multiprocessors(device) / max(1, sum(blocks))
    segments: list[tuple[int, int, int]] = []
    firsts, ranges, launches = [0], [], []
    for kind in dict.fromkeys(kinds):
        first = len(firsts) - 1
        for group in range(number):
            start = len(firsts) - 1
            members = [
                leaf for leaf, of in enumerate(of_leaf) if of == group and kinds[leaf] == kind
            ]
            count = sum(blocks[leaf] for leaf in members)
            share = min(count, max(1, int(limit * count)))
            ends = [count * (program + 1) // share for program in range(share)]
            at = 0  # blocks of the group so far
            for leaf in members:
                done, width = 0, layouts[leaf][0]
                while done < blocks[leaf]:
                    end = ends[len(firsts) - 1 - start]
                    upto = min(blocks[leaf], done + end - at)
                    segments.append((leaf, done * columns, min(width, upto * columns)))
                    at, done = at + upto - done, upto
                    if at == end:
                        firsts.append(len(segments))
            ranges.append((start, len(firsts) - 1))
        launches.append((kind, first, len(firsts) - 1 - first))
    strides = [(row, column) for _, row, column in layouts]
    return _Plan(
        layouts=_on_device([(*s, g) for s, g in zip(strides, of_leaf, strict=True)], device),
        segments=_on_device(segments or [(0, 0, 0)], device),
        firsts=_on_device(firsts, device),
        ranges=_on_device(ranges, device),
        kinds=tuple(launches),
        programs=len(firsts) - 1,
        groups=number,
        columns=columns,
    )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
