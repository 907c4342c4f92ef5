"""Stacked leaves as matrices: large ones in blocks that fit a cache, small ones side by side."""

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradagree_opt.annotations import Float

BLOCK_ENTRIES = 2**20
"""Entries of a block that a CPU reads several times: 4 MiB of float32, half or less of a cache."""
PART_ENTRIES = 2**24
"""Entries that a GPU reads together; a larger leaf is read by itself."""


def rows(leaf: Float[Tensor, "n ..."], /) -> Float[Tensor, "n d"]:
    """The leaf as a matrix with one row a task, also where a task's entry has no axes."""
    return leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1)


def column_blocks(
    leaf: Float[Tensor, "n ..."], dtype: torch.dtype, /
) -> Iterator[Float[Tensor, "n columns"]]:
    """The leaf as matrices ``[n, columns]`` of the dtype that fit a processor's cache together.

    A caller that is done with one block before it takes the next reads the leaf from memory once,
    however often it reads the block. Under a compiler and on a GPU the whole leaf is one block,
    which is faster there.
    """
    return (block.to(dtype) for block in _columns(leaf))


def _columns(leaf: Tensor) -> Sequence[Tensor]:
    matrix = rows(leaf)
    whole = leaf.device.type != "cpu" or torch.compiler.is_compiling()
    if whole or matrix.numel() <= BLOCK_ENTRIES:
        return [matrix] if matrix.numel() else []
    width = max(1, BLOCK_ENTRIES // matrix.shape[0])
    return [matrix[:, at : at + width] for at in range(0, matrix.shape[1], width)]


def blocks_of_all(
    leaves: Sequence[Float[Tensor, "n ..."]], dtype: torch.dtype | None = None, /
) -> Iterator[Float[Tensor, "n columns"]]:
    """All leaves as matrices ``[n, columns]``, of the dtype or their own, in no certain order."""
    return (block.to(dtype or block.dtype) for part in _parts(leaves) for block in part)


def unit_parts(
    leaves: Sequence[Tensor], dtype: torch.dtype, /, *, scaled: bool
) -> Iterator[tuple[Float[Tensor, ""], Iterator[Float[Tensor, "n columns"]]]]:
    """The blocks of all leaves divided by a scale, as many at a time as fit a cache together.

    The scale is yielded with them: the power of two below their largest finite entry, so that the
    division rounds nothing; 0 if all entries are zero; 1 without scaling.
    """
    for part in _parts(leaves):
        if scaled:
            scale = power_of_two(_finite_maxima(part, dtype).amax())
            unit = or_one(scale)
            yield scale, (block.to(dtype) / unit for block in part)
        else:
            yield part[0].new_ones((), dtype=dtype), (block.to(dtype) for block in part)


def row_unit_parts(
    leaves: Sequence[Tensor], dtype: torch.dtype, /
) -> Iterator[tuple[Float[Tensor, " n"], Iterator[Float[Tensor, "n columns"]]]]:
    """The parts of :func:`unit_parts`, each row in units of a scale of its own.

    The scales come with them ``[n]``, 0 for a row of zeros.
    """
    for part in _parts(leaves):
        scales = power_of_two(_finite_maxima(part, dtype).amax(0))
        units = or_one(scales).unsqueeze(1)
        yield scales, (block.to(dtype) / units for block in part)


def _parts(leaves: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The blocks of all leaves in lists of limited size; one list where a compiler joins them."""
    together, joined = _limits(leaves[0])
    part: list[Tensor] = []
    entries = 0
    for leaf in leaves:
        for block in _columns(leaf):
            if block.numel() >= together:
                yield [block]
                continue
            entries += block.numel()
            if entries > together:
                yield _side_by_side(part, joined)
                part, entries = [], block.numel()
            part.append(block)
    if part:
        yield _side_by_side(part, joined)


def _limits(leaf: Tensor) -> tuple[int, int]:
    """Most entries of a part, and of a block that is cheaper to join to others than to visit."""
    if torch.compiler.is_compiling():
        return sys.maxsize, 0
    if leaf.device.type == "cpu":
        return BLOCK_ENTRIES, BLOCK_ENTRIES // 32
    return PART_ENTRIES, PART_ENTRIES // 4


def _side_by_side(part: list[Tensor], joined: int) -> list[Tensor]:
    """The blocks, with those of at most ``joined`` entries put into one."""
    small = [block for block in part if block.numel() <= joined]
    if len(small) < 2:
        return part
    return [torch.cat(small, 1), *(block for block in part if block.numel() > joined)]


def _finite_maxima(blocks: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "blocks n"]:
    """Largest absolute entry of every row of every block; 0 for a row that is not finite."""
    maxima = torch.stack([absolute_maxima(block).to(dtype) for block in blocks])
    return maxima.nan_to_num(0.0, 0.0, 0.0)


def power_of_two(sizes: Tensor) -> Tensor:
    """The largest power of two that is not above each size; 0 for 0."""
    return sizes / (2 * or_one(torch.frexp(sizes).mantissa))


def absolute_maxima(matrix: Float[Tensor, "n columns"]) -> Float[Tensor, " n"]:
    """Largest absolute entry of every row."""
    # vector_norm of order inf says the same in ten times the time on a CPU (torch 2.14).
    return torch.maximum(matrix.amax(1), matrix.amin(1).neg())


def or_one(values: Tensor, /) -> Tensor:
    """The values, with 1 in place of zeros: safe to divide by."""
    return values + (values == 0)
