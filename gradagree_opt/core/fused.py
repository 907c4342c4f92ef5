"""Measure and apply in one launch each: a task stack on a GPU, read by kernels written in Triton.

A program reads blocks of columns of some leaves, each task in units of a power of two of its own,
and leaves its sums in a table that a second, small launch adds up, always in one order. Leaves are
found by a table of pointers. Nothing here waits for the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core import fused_kernels as kernels
from gradagree_opt.core.fused_plans import plan, table

TILE = 8192
"""Entries that a program reads at a time: n tasks (up to a power of two) by the columns."""
COLUMNS = 1024
"""Columns of a tile, at most."""
WARPS = 4
PROGRAMS = 8
"""Programs to each multiprocessor, at most."""
GRAMIAN_TILE = 4096
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
    stack = _Stack(leaves, groups, programs=PROGRAMS, tile=TILE)
    plan, n, new = stack.plan, stack.n, stack.new
    parts = new(plan.programs * (1 + 3 * n))
    stack.read(kernels.measure, parts)
    shape = stack.groups
    values, scale = new(4, *shape, n), new(*shape)
    finite = torch.empty(*shape, n, dtype=torch.bool, device=parts.device)
    rows = min(32, stack.rows)
    grid = plan.groups, triton.cdiv(n, rows), 1
    numbers = n, plan.programs, len(plan.kinds)
    results = values, scale, finite
    of = rows, max(1, 2048 // rows)
    _launch(kernels.finish, grid, parts, plan.ranges, *results, *numbers, of=of)
    sums, squares, units, lengths = values.unbind()
    return Sums(sums, squares, units, lengths, finite, scale)


def inner_products(
    leaves: Sequence[Tensor], groups: Sequence[int] | None = None, /
) -> tuple[Float[Tensor, "*groups n"], Float[Tensor, "*groups n n"]]:
    """Units of the tasks and (g_i / unit_i) · (g_j / unit_j), in one read of the leaves.

    The units are powers of two, 0 for a zero signal; the arguments are those of :func:`row_sums`.
    """
    stack = _Stack(leaves, groups, least=16, programs=GRAMIAN_PROGRAMS, tile=GRAMIAN_TILE)
    plan, n, new = stack.plan, stack.n, stack.new
    parts = new(plan.programs * n * (1 + n))
    stack.read(kernels.measure_products, parts)
    units, products = new(*stack.groups, n), new(*stack.groups, n, n)
    numbers = n, plan.programs, len(plan.kinds)
    of = stack.rows, max(1, 2048 // stack.rows)
    grid = plan.groups, n, 1
    _launch(kernels.finish_products, grid, parts, plan.ranges, units, products, *numbers, of=of)
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
    stack = _Stack(leaves, groups, programs=PROGRAMS, tile=TILE)
    plan, new = stack.plan, stack.new
    device = stack.place[0]
    sums = [
        torch.empty(shape, dtype=leaf.dtype, device=device)
        for shape, leaf in zip(plan.shapes, leaves, strict=True)
    ]
    parts, norm = new(2 * plan.programs), new()
    outs = table(tuple(map(Tensor.data_ptr, sums)), *stack.place)
    stack.read(kernels.apply, parts, outs, weights.contiguous())
    _launch(kernels.finish_norm, (1, 1, 1), parts, norm, plan.programs, of=(1024,))
    return sums, norm


class _Stack:
    """Task-stacked leaves as the kernels take them."""

    def __init__(
        self,
        leaves: Sequence[Tensor],
        groups: Sequence[int] | None,
        *,
        least: int = 1,
        programs: int,
        tile: int,
    ) -> None:
        self.n = n = int(leaves[0].shape[0])
        device = leaves[0].device
        self.place = device, _stream(device)
        self.rows = max(least, triton.next_power_of_2(n))
        kinds = tuple([leaf.dtype for leaf in leaves])
        self.plan = plan(
            tuple([leaf.shape for leaf in leaves]),
            tuple([leaf.stride() for leaf in leaves]),
            kinds,
            None if groups is None else tuple(groups),
            min(COLUMNS, max(16, tile // self.rows)),
            programs,
            *self.place,
        )
        self.groups = () if groups is None else (self.plan.groups,)
        self.dtype = torch.float64 if torch.float64 in kinds else torch.float32
        pointers = [leaf.data_ptr() for leaf in leaves]
        self.copies = {index: leaves[index].contiguous() for index in self.plan.copied}
        for index, copy in self.copies.items():
            pointers[index] = copy.data_ptr()
        self.pointers = table(tuple(pointers), *self.place)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.place[0])

    def read(self, kernel: Any, parts: Tensor, *others: Tensor) -> None:
        """Launches a kernel that reads the leaves, those of one dtype at a time."""
        plan = self.plan
        for kind, first, count in plan.kinds:
            if count:
                numbers = self.n, first, plan.programs
                tables = self.pointers, plan.layouts, plan.segments, plan.firsts
                constants = KINDS[kind], self.rows, plan.columns
                _launch(kernel, (count, 1, 1), *tables, parts, *others, *numbers, of=constants)


def _launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, of: tuple[Any, ...]) -> None:
    """Launches a kernel of these constants, without a look at its arguments once it is known.

    The kernels are compiled for the dtypes alone, and not for certain numbers or alignments.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, *arguments, of=of)
        return
    key = kernel, device, of, tuple([tensor.dtype for tensor in tensors])
    launch = _compiled.get(key)
    if launch is None:
        _compiled[key] = kernel[grid](*arguments, *of, num_warps=WARPS) or kernel
    else:  # by the interpreter it is the kernel itself
        launch[grid](*arguments, *of)


_compiled: dict[tuple[Any, ...], Any] = {}


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
