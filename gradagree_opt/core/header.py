"""The header that every rank sends first in a step, and the check that all have the same to do."""

import re
import zlib
from collections.abc import Callable, Sequence
from enum import IntFlag
from typing import NamedTuple

from torch import Tensor

from gradagree_opt.core.transforms import is_batched


class TaskForm(IntFlag):
    """What the tasks of a loop or an engine consist of, which shapes do not show."""

    UNKNOWN = 0
    LOSSES = 1
    DISPLACEMENTS = 2

    @property
    def call(self) -> str:
        """The call that gives such a task to a ``TaskBatch``."""
        names = {TaskForm.LOSSES: "loss", TaskForm.DISPLACEMENTS: "adapted=…"}
        return f"add({', '.join(name for form, name in names.items() if form in self)})"

    def __str__(self) -> str:
        """In the words of a message."""
        return {
            TaskForm.LOSSES: "losses, as of add(loss)",
            TaskForm.DISPLACEMENTS: "displacements, as of add(adapted=…) and Reptile",
        }.get(self, "losses with displacements, as of add(loss, adapted=…) and MAML")


class Header(NamedTuple):
    """What every rank sends first.

    Attributes:
        n, d: number of its tasks, and of the entries of a signal.
        failed: 1 if the rank has failed and takes no part in the step.
        options: a digest of what has to be the same on all ranks.
        form: 2 if there are directions beside the signals, 1 if not, 0 without a task.
        tasks: the :class:`TaskForm` of its tasks.
        layout: a digest of the shapes and dtypes of its part of the directions, on which the length
            of its last message depends.
        rounding: a digest of what its rounding depends on, or a number of its own if its weighting
            draws by itself. Ranks that differ in it may decide differently.
        block, part: ``block`` and ``index`` of :class:`gradagree_opt.core.shards.Shards`.
    """

    n: int = 0
    d: int = 0
    failed: int = 0
    options: int = 0
    form: int = 0
    tasks: int = 0
    layout: int = 0
    rounding: int = 0
    block: int = -1
    part: int = 0


def words_of(
    leaves: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], options: Sequence[str], /
) -> list[str]:
    """Descriptions of all that has to be the same on every rank: the options, then the leaves.

    The last options are the names of the leaves.

    Raises:
        ValueError: the leaves are those of vmap.

    >>> import torch
    >>> words_of([torch.ones(1, 2)], [(2,)], ["Mean()", "w"])
    ['Mean()', 'w', "float32 [2] of 'w'"]
    """
    if any(map(is_batched, leaves)):
        raise ValueError(
            "expected tensors that can be sent to other ranks, found those of vmap; call the "
            "aggregation outside of it"
        )
    # Without addresses of functions, which differ, and without the line breaks of tensors.
    words = [re.sub(r" at 0x[0-9a-f]+|\s*\n", "", option) for option in options]
    names = options[len(options) - len(leaves) :]
    for name, leaf, shape in zip(names, leaves, shapes, strict=True):
        words.append(f"{str(leaf.dtype).removeprefix('torch.')} {list(shape)} of {name!r}")
    return words


def digest(value: object, /) -> int:
    """A checksum of the value as text."""
    return zlib.crc32(str(value).encode())


def check_alike(table: Sequence[Header], differences: Callable[[], str], /) -> None:
    """Raises a ValueError, on all ranks alike, unless they have the same to do.

    Args:
        table: the headers of all ranks.
        differences: says which of the options differ.
    """
    if len({(header.d, header.options) for header in table}) > 1:
        raise ValueError(
            "expected the same parameters and options of the aggregator on all ranks, found "
            f"{differences()}; build model and aggregator alike on every rank"
        )
    found = {
        form: f"{form}, on rank {rank}"
        for rank, header in enumerate(table)
        if (form := TaskForm(header.tasks))
    }
    if len(found) > 1:
        raise ValueError(
            "expected tasks of one form on all ranks, found "
            f"{' and '.join(found.values())}; call the same step on every rank"
        )
    forms = [header.form for header in table]
    if {1, 2} <= {*forms}:
        raise ValueError(
            "expected tasks of one form on all ranks, found signals beside the directions on "
            f"some alone; call the aggregation in the same way on every rank (found {forms})"
        )
    first: dict[int, int] = {}  # of the ranks with the same part
    for rank, header in enumerate(table):
        other = first.setdefault(header.part, rank)
        if header.layout != table[other].layout:
            raise ValueError(
                f"expected directions alike on all ranks, found other shapes on rank {rank} than "
                f"on rank {other}; build model and tasks alike on every rank"
            )
