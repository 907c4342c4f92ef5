"""A rank that does not answer: the others find out through the store which one it is."""

import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

LOOK = timedelta(seconds=1)
"""From one look at the store to the next, while a message waits."""
PATIENCE = 10.0
"""Seconds that a rank which has noticed waits for others to notice."""


class RankLostError(RuntimeError):
    """A rank has died, or waited past the timeout: no second try of this one helps."""


def reduce_over(tensor: Tensor, group: Any, all_of: Any, operation: Any = None, /) -> None:
    """Sums a tensor over the ranks, in place.

    Args:
        tensor: of the same shape on all.
        group: process group of these ranks.
        all_of: that of all who take part in the step, and would wait too.
        operation: another one than the sum.

    Raises:
        RankLostError: a rank has not answered. On gloo it is named: each rank that notices leaves
            its number in the store and waits for those of the others.
    """
    distributed, start = torch.distributed, time.monotonic()
    try:
        operation = distributed.ReduceOp.SUM if operation is None else operation
        waits = backends(group).get(tensor.device.type) == "gloo"
        work = distributed.all_reduce(tensor, operation, group, async_op=waits)
        if not waits:
            return
        while not _arrived(work):
            # A rank whose own connections hold would notice at the timeout alone.
            if _keys("noticed", all_of):
                break
        else:
            return
        cause = None
    except RuntimeError as error:
        cause = error
    found = _found(all_of, time.monotonic() - start)
    raise RankLostError(
        f"expected an answer of every rank, found {found}; nothing was changed on this "
        "one: start all of them again from the last checkpoint"
    ) from cause


def leave_word(group: Any, /) -> None:
    """Says in the store that this rank has failed where the others wait for a message of it."""
    size, own = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    with suppress(RuntimeError, AttributeError):  # of a store that is gone
        for word in ("failed", "noticed", "told"):
            _leave(word, own, group)
        _wait_for(size, "told", group, 3 * LOOK.total_seconds())  # it may go with this process


def check_no_word(group: Any, /) -> None:
    """Raises a RankLostError where a rank has left word: the others have given the step up."""
    if failed := _keys("failed", group):
        raise RankLostError(
            "expected ranks whose messages belong together, found that a step was broken off when "
            f"rank {', '.join(map(str, failed))} failed in the middle of it; start all of them "
            "again from the last checkpoint"
        )


def backends(group: Any, /) -> dict[str, str]:
    """Which backend of a process group serves which kind of device."""
    config: str = torch.distributed.get_backend_config(group)
    return dict(each.split(":") for each in config.split(","))


def _arrived(work: Any) -> bool:
    """Waits for a message, but not for long; raises where it failed."""
    try:
        work.wait(LOOK)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()
    return True


def _found(group: Any, waited: float) -> str:
    """Who has not answered, in words.

    ``waited``: seconds that this rank has waited for the others.
    """
    size, own = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    try:
        if failed := _keys("failed", group):
            for word in ("noticed", "told"):
                _leave(word, own, group)
            names = ", ".join(map(str, failed))
            return f"that rank {names} failed in the middle of a step, as its own message says"
        # If others have noticed and this rank has only just come, they may have waited for it.
        if _keys("noticed", group) and waited < LOOK.total_seconds():
            _leave("late", own, group)
        _leave("noticed", own, group)
        noticed = _wait_for(size, "noticed", group, PATIENCE)
        lost = [rank for rank in range(size) if rank not in noticed] or _keys("late", group)
        _leave("told", own, group)
        with suppress(RuntimeError):  # the store may end with this process: first all read it
            _wait_for(len(noticed), "told", group, 2.0)
    except (RuntimeError, AttributeError):
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        holder = "torchrun's agent on the first node" if agent else "rank 0"
        return f"that {holder} is gone, and with it the store that would name who was lost first"
    if lost == [own]:
        return "that they had given up on this one, which came after their timeout"
    names = f"rank {', '.join(map(str, lost))}" if lost else "a rank"
    return f"none of {names}, which has died, or not come before the timeout"


def _wait_for(count: int, word: str, group: Any, patience: float) -> list[int]:
    """Waits for so many ranks to leave a word, only briefly for the last; gives those that have."""
    end = time.monotonic() + patience
    nearly = False
    while len(found := _keys(word, group)) < count and time.monotonic() < end:
        if len(found) >= count - 1 and not nearly:
            nearly = True
            end = min(end, time.monotonic() + 3 * LOOK.total_seconds())
        time.sleep(0.05)
    return found


def _leave(word: str, rank: int, group: Any) -> None:
    _store(group).set(f"gradagree/{word}/{rank}", "")


def _keys(word: str, group: Any) -> list[int]:
    """The ranks that have left a word."""
    store, size = _store(group), torch.distributed.get_world_size(group)
    return [rank for rank in range(size) if store.check([f"gradagree/{word}/{rank}"])]


def _store(group: Any) -> Any:
    group = torch.distributed.group.WORLD if group is None else group
    if not hasattr(group, "get_group_store"):  # before PyTorch 2.6
        return torch.distributed.distributed_c10d._get_process_group_store(group)
    return group.get_group_store()
