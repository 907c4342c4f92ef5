"""What the ranks of a process group tell each other, and what is said where one does not answer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradagree_opt.annotations import Float


class RankLostError(RuntimeError):
    """A rank has died, or waited past the timeout: no second try of this one helps."""


class Messages:
    """What the ranks of a process group tell each other, by all-reduces alone."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.counts: list[int] = []
        self.joined = False
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
        return {**vars(self), "counts": []}

    def check_group(self) -> None:
        """Raises a ValueError without a process group, or on a rank outside of it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(
                "expected a process group, found none; call "
                "torch.distributed.init_process_group(…) first, and start by torchrun"
            )
        if torch.distributed.get_rank(self.group) < 0:
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
    def step(self) -> Iterator[None]:
        """Around what leads to an aggregation: tells the others where this rank fails before."""
        self.check_group()
        self.joined = False
        try:
            yield
        except Exception:
            if not self.joined:
                self.tell(0, 0, 0, failed=True)
            raise

    def tell(self, n: int, d: int, digest: int, *, failed: bool) -> list[list[int]]:
        """What every rank has to say first."""
        self.joined = True
        header = torch.zeros(self.size, 4, dtype=torch.int64, device=self._device())
        header[self.rank] = torch.tensor([n, d, digest, int(failed)])
        self.reduce(header)
        table: list[list[int]] = header.tolist()
        return table

    def agree(self, error: Exception | None, value: int) -> list[int]:
        """Every rank's value; raises where one of them has failed."""
        table = torch.zeros(self.size, 2, dtype=torch.int64, device=self._device())
        table[self.rank] = torch.tensor([int(error is not None), value])
        self.reduce(table)
        if error is not None:
            raise error
        failed, values = table.T.tolist()
        self.check_none([rank for rank, flag in enumerate(failed) if flag])
        return list(values)

    def used_by_any(self, used: Sequence[bool], device: torch.device, /) -> list[bool]:
        """Which of the parameters a loss of any rank depends on."""
        flags = torch.tensor(used, dtype=torch.int32, device=device)
        self.reduce(flags)
        return (flags > 0).tolist()

    def check_none(self, failed: list[int]) -> None:
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

    def reduce(self, tensor: Tensor) -> None:
        try:
            torch.distributed.all_reduce(tensor, group=self.group)
        except RuntimeError as error:
            raise RankLostError(
                "expected an answer of every rank, found that one has died or waited past the "
                "timeout of the process group; nothing was changed on this one: start all of them "
                "again from the last checkpoint"
            ) from error

    def _device(self) -> torch.device:
        if torch.distributed.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
