"""Messages between the ranks of a process group, and what is raised where ranks disagree."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from math import isclose, isnan
from typing import Any

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.header import Header, TaskForm
from gradagree_opt.core.lost import (
    RankLostError,
    backends,
    check_no_word,
    leave_word,
    reduce_over,
)

LIKE_WEIGHTS = 1e-3
"""Weights that differ by less than this, relative to their size, differ by rounding alone."""


class Messages:
    """The messages of a process group in one step after another, by all-reduces alone.

    Attributes:
        counts: how many tasks each rank has in the current step.
        inside: whether a step is under way.
        joined: whether this rank has sent its header in it.
        owing: whether the other ranks wait for a message that is not in ``due``, or that this rank
            can no longer make.
        left_word: whether this rank failed while it owed one, and left word of it in the store.
        alike: whether every rank is sure to decide as the first one does.
        form: of the tasks of the step.
        flags: gives this rank's flags, as many as every other rank has.
        flagged: the flags that any rank has raised, by the last message.
        due: the messages that the others still wait for, as vectors of zeros of their lengths. A
            rank that fails sends the first of them to say so.
        left: the batch in which a task has failed before any step; the others wait for its step.
        groups: process groups of ranks with the same part of sharded parameters.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.counts: list[int] = []
        self.inside = self.joined = self.owing = self.left_word = False
        self.alike = True
        self.form = TaskForm.UNKNOWN
        self.flags: Callable[[], list[bool]] = list
        self.flagged: list[bool] = []
        self.due: list[Tensor] = []
        self.left: object = None
        self.groups: dict[tuple[int, ...], Any] = {}
        if group is not None:
            self.check_group()

    def __deepcopy__(self, memo: Any) -> "Messages":
        return self  # a process group is no value

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError(
                "expected ga.distributed(aggregator) of all ranks where it is pickled, found one "
                "of a process group, which no file and no other process holds; leave the "
                "aggregator out, and make it anew where it is loaded"
            )
        anew: dict[str, Any] = {"counts": [], "due": [], "left": None, "groups": {}}
        return {**vars(self), **anew, "left_word": False}

    def check_group(self) -> None:
        """Raises where there is no process group, or this rank is outside of it.

        Raises:
            TypeError: the group is none.
            ValueError: none was made, it is destroyed, or it has no place for this rank.
        """
        distributed, group = torch.distributed, self.group
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "expected a process group, found none; call "
                "torch.distributed.init_process_group(…) first, and start by torchrun"
            )
        outside = distributed.GroupMember.NON_GROUP_MEMBER
        if group not in (None, outside) and not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"expected a process group, found {type(group).__name__}; give one as of "
                "torch.distributed.new_group(…), or a device mesh's get_group()"
            )
        try:
            rank = distributed.get_rank(group)
        except ValueError:
            raise ValueError(
                "expected a process group that is there, found one that was destroyed; call "
                "ga.distributed(aggregator, group) again with a new one"
            ) from None
        if rank < 0:
            raise ValueError(
                "expected a rank of the process group, found one outside of it; leave the step to "
                "the ranks of the group"
            )

    @property
    def rank(self) -> int:
        """The number of this one in the group."""
        return torch.distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return torch.distributed.get_world_size(self.group)

    @contextmanager
    def step(self, batch: object = None, form: TaskForm = TaskForm.UNKNOWN) -> Iterator[None]:
        """A context around an aggregation and what leads to it: tells others if this rank fails.

        Args:
            batch: the batch whose step it is; one of its tasks may have failed before.
            form: of its tasks.
        """
        if self.inside:  # as an aggregation in the step of an adapter
            self.form = form or self.form
            yield
            return
        self.check_group()
        if self.left_word:
            check_no_word(self.group)
        self.inside, self.joined, self.owing, self.due = True, False, False, []
        self.form = form
        try:
            if self.left not in (None, batch):
                raise ValueError(
                    "expected backward() of the batch whose add() failed, found a step of others; "
                    "call it, without that task or any, or let the failure end the process"
                )
            self.left = None
            yield
        except Exception as error:
            self.left = None
            try:
                if not self.joined:
                    self.tell(Header(failed=1))
                elif self.due:
                    self._send(self.due[:1], self.due[0].new_tensor([1, 0, 0]))
            finally:
                if self.owing and not isinstance(error, RankLostError):
                    self.left_word = True
                    leave_word(self.group)
            raise
        finally:
            self.inside, self.flags = False, list

    def forget(self, batch: object, /) -> None:
        """A batch is cleared: if a task has failed in it, the step that others wait for is lost."""
        if self.left is batch:
            self.left = self  # no step's batch, so that the next step fails on all

    def tell(self, own: Header) -> list[Header]:
        """Sends this rank's header, and gives those of all ranks."""
        self.joined = True
        table = torch.zeros(self.size, len(own), dtype=torch.int64, device=self._device())
        table[self.rank] = torch.tensor(own)
        self.reduce(table)
        return [Header(*row) for row in table.tolist()]

    def send(self, own: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
        """Sums the message that is due next over the ranks, after a report of each of them.

        Args:
            own: vectors of the same lengths on all ranks.
            weights: those of all tasks, as this rank has decided, to compare with the others'.

        Raises:
            ValueError: another rank has failed, or has taken other weights.
        """
        rest, own_words = self.due[1:], own[0].new_zeros(3)
        if weights is not None:
            each = weights.detach().flatten().double()
            # Multiples of the golden ratio: the same weights in another order give another sum.
            places = torch.arange(len(each), dtype=each.dtype, device=each.device)
            factors = 0.6180339887498949 * places % 1 + 0.5
            own_words[1:] = torch.stack([each @ factors, each.abs() @ factors])
        words, total = self._send(own, own_words)
        self.check_none([rank for rank, (failed, _, _) in enumerate(words) if failed])
        (_, first, _), size = words[0], max(size for _, _, size in words)
        for rank, (_, other, _) in enumerate(words):
            both_nan = isnan(first) and isnan(other)
            if not (both_nan or isclose(other, first, rel_tol=0, abs_tol=LIKE_WEIGHTS * size)):
                raise ValueError(
                    f"expected the same weights on all ranks, found others on rank {rank} than on "
                    "rank 0; give a weighting that draws by itself or remembers what it has seen "
                    "the attribute draws_itself = True"
                )
        self.due = rest
        return total

    def differences(self, words: Sequence[str]) -> str:
        """What differs between ranks, once it is known that something does: two extra messages.

        Args:
            words: of this rank, one for each thing that has to be alike.
        """
        own = "\n".join(words).encode()
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self._device())
        lengths[self.rank] = len(own)
        self.reduce(lengths)
        table = torch.zeros(self.size, int(lengths.amax()), dtype=torch.uint8)
        table[self.rank, : len(own)] = torch.tensor([*own], dtype=torch.uint8)
        table = table.to(self._device())
        self.reduce(table)
        rows = zip(table.tolist(), lengths.tolist(), strict=True)
        said = [bytes(row[:length]).decode().split("\n") for row, length in rows]
        for rank, other in enumerate(said):
            for one, another in zip_longest(said[0], other, fillvalue="nothing"):
                if one != another:
                    return f"{one} on rank 0 and {another} on rank {rank}"
        return "others in a way that their words do not show"

    def check_none(self, failed: list[int]) -> None:
        """Raises a ValueError where some ranks have failed."""
        if failed:
            names = ", ".join(map(str, failed))
            raise ValueError(
                f"expected every rank to take part in the step, found that rank {names} failed "
                "in it; its own message says why, and nothing was changed on this one"
            )

    def table(
        self, own_rows: Tensor, own: slice, n: int, draws: Tensor | None
    ) -> Float[Tensor, "n columns"]:
        """The rows of all ranks; the second column is the first rank's draws."""
        table = own_rows.new_zeros(n, own_rows.shape[1])
        table[own] = own_rows
        if draws is not None and self.rank == 0:
            table[:, 1] = draws.to(table)
        self.reduce(table)
        return table

    def of_first(self, own: Tensor, /) -> Tensor:
        """The first rank's value, where the ranks are unlike and may have rounded differently."""
        if self.alike:
            return own
        told = own.clone() if self.rank == 0 else torch.zeros_like(own)
        self.reduce(told)
        return told

    def _send(self, own: Sequence[Tensor], words: Tensor) -> tuple[list[list[float]], Tensor]:
        self.due, self.owing = [], True  # until it has arrived
        table = words.new_zeros(self.size, len(words))
        table[self.rank] = words
        message = torch.cat([table.flatten(), words.new_tensor(self.flags()), *own])
        self.owing = False
        self.reduce(message)
        told, total = torch.tensor_split(message, [len(message) - sum(map(len, own))])
        rows, flags = torch.tensor_split(told.cpu(), [table.numel()])
        self.flagged = (flags > 0).tolist()
        return rows.view_as(table).tolist(), total

    def reduce(self, tensor: Tensor) -> None:
        reduce_over(tensor, self.group, self.group)

    def _device(self) -> torch.device:
        """The device of headers and text: the CPU if the group serves it, else the group's own."""
        kinds = [*backends(self.group)]
        if "cpu" in kinds:
            return torch.device("cpu")
        return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
