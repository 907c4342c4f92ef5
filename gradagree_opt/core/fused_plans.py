"""Which program of a launch reads which piece of which leaf: worked out once for like shapes."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """What the programs of a launch read, for leaves of certain shapes.

    Attributes:
        layouts: of every leaf the strides of rows and columns, and its group.
        segments: leaf, first and last column of every piece that a program reads.
        firsts: first segment of every program, and their number.
        ranges: of every group and dtype the first program and the last.
        kinds: of every dtype its first program and how many there are.
        copied: leaves whose columns have no one stride.
        shapes: of every leaf that of a task.
    """

    layouts: Tensor
    segments: Tensor
    firsts: Tensor
    ranges: Tensor
    kinds: tuple[tuple[torch.dtype, int, int], ...]
    programs: int
    groups: int
    columns: int
    copied: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=256)
def plan(
    shapes: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    kinds: tuple[torch.dtype, ...],
    groups: tuple[int, ...] | None,
    columns: int,
    programs: int,
    device: torch.device,
    _: int,
) -> Plan:
    """The plan for leaves of these shapes, strides, dtypes and groups, on one stream."""
    layouts, copied = [], []
    for leaf, (shape, stride) in enumerate(zip(shapes, strides, strict=True)):
        layout = _collapsed(shape, stride)
        if layout is None:
            copied.append(leaf)
            width = math.prod(shape[1:])
            layout = width, width, 1
        layouts.append(layout)
    of_leaf = groups or (0,) * len(layouts)
    number = max(of_leaf) + 1
    blocks = [-(-width // columns) for width, _, _ in layouts]
    limit = programs * _multiprocessors(device) / max(1, sum(blocks))
    members = defaultdict(list)
    for leaf, place in enumerate(zip(kinds, of_leaf, strict=True)):
        members[place].append(leaf)
    segments: list[tuple[int, int, int]] = []
    firsts, ranges, launches = [0], [], []
    for kind in dict.fromkeys(kinds):
        first = len(firsts) - 1
        for group in range(number):
            start = len(firsts) - 1
            count = sum(blocks[leaf] for leaf in members[kind, group])
            share = min(count, max(1, int(limit * count)))
            for pieces in _dealt([(leaf, blocks[leaf]) for leaf in members[kind, group]], share):
                segments += [
                    (leaf, begin * columns, min(layouts[leaf][0], end * columns))
                    for leaf, begin, end in pieces
                ]
                firsts.append(len(segments))
            ranges.append((start, len(firsts) - 1))
        launches.append((kind, first, len(firsts) - 1 - first))
    places = [
        (row, column, group) for (_, row, column), group in zip(layouts, of_leaf, strict=True)
    ]
    return Plan(
        layouts=_on_device(places, device),
        segments=_on_device(segments or [(0, 0, 0)], device),
        firsts=_on_device(firsts, device),
        ranges=_on_device(ranges, device),
        kinds=tuple(launches),
        programs=len(firsts) - 1,
        groups=number,
        columns=columns,
        copied=tuple(copied),
        shapes=tuple([tuple(shape[1:]) for shape in shapes]),
    )


def _dealt(sizes: Sequence[tuple[int, int]], programs: int) -> Iterator[list[tuple[int, int, int]]]:
    """For each program in turn its pieces of leaves: leaf, first block, and the one after the last.

    Args:
        sizes: leaves and how many blocks each has.
        programs: that get as many blocks, up to one.
    """
    count, at, program = sum(size for _, size in sizes), 0, 0
    pieces: list[tuple[int, int, int]] = []
    for leaf, size in sizes:
        done = 0
        while done < size:
            end = count * (program + 1) // programs
            upto = min(size, done + end - at)
            pieces.append((leaf, done, upto))
            at, done = at + upto - done, upto
            if at == end:
                yield pieces
                pieces, program = [], program + 1


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _collapsed(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Columns, and the strides of rows and columns; None where columns have no one stride."""
    width, column = 1, 1
    for size, stride in zip(reversed(shape[1:]), reversed(strides[1:]), strict=True):
        if size == 1:
            continue
        if width == 1:
            column = stride
        elif stride != width * column:
            return None
        width *= size
    return width, strides[0], column


@lru_cache(maxsize=256)
def table(numbers: tuple[int, ...], device: torch.device, _: int) -> Tensor:
    """The numbers on the device, for one stream; where memory is reused, they are copied once."""
    return _on_device(numbers, device)


def _on_device(numbers: Any, device: torch.device) -> Tensor:
    pinned = device.type == "cuda"
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=pinned)
    return table.to(device, non_blocking=True)
