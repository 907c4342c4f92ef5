"""Programs of ranks of which one dies or hangs."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from common import (
    PARAMS,
    RANK,
    STORE,
    WORLD,
    Model,
    check_same_bits,
    join,
    leave,
    loss_of,
)
from torch import Tensor

import gradagree_opt as ga
from gradagree_opt.core import own_part, pipeline, ranks
from gradagree_opt.core.lost import RankLostError


def lost(before: Callable[[], None], timeout: float, gone: int = WORLD - 1) -> None:
    """A rank does something before its second step: the others name it, nothing changed."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 4, 3)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = ga.TaskOptimizer(adam, ga.distributed(ga.GradientAgreement()))
    optimizer.step([model(task).square().mean() for task in x])
    optimizer.zero_grad()
    kept = [p.detach().clone() for p in model.parameters()]
    if gone == RANK:
        before()
    start = time.monotonic()
    others = f"(none of|that) rank {gone}(, which| is gone)"
    words = "given up on this one" if gone == RANK else others
    with pytest.raises(RuntimeError, match=f"{words}.*checkpoint"):
        optimizer.step([model(task).square().mean() for task in x])
    assert all(map(torch.equal, kept, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert time.monotonic() - start < timeout + 20
    os._exit(0)  # the group cannot be taken down without the rank that is gone


def killed() -> None:
    """One that ends without a word."""
    join(60)
    lost(lambda: os._exit(9), 60)


def killed_in_a_group_of_no_named_backend() -> None:
    """So it is begun by a script for CPUs and GPUs alike; four have neighbours and others."""
    join(60, None)
    lost(lambda: os._exit(9), 60)


def killed_with_its_store() -> None:
    """Rank 0, which holds the store where the others would leave word."""
    place = Path(f"{STORE}.port")
    if RANK == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place.with_suffix(".new").write_text(str(store.port))
        place.with_suffix(".new").replace(place)
    else:
        while not place.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(place.read_text()), is_master=False)
    time_out = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD, timeout=time_out)
    lost(lambda: os._exit(9), 60, gone=0)


def hanging() -> None:
    """One that comes after the timeout."""
    join(5)
    lost(lambda: time.sleep(10), 5)


def failing() -> None:
    """One whose memory does not suffice where the others wait for it, and which lives on."""
    join(60)
    stack, last = torch.ones(2, 2000), RANK == WORLD - 1
    groups = [dist.new_group([*range(WORLD)]) for _ in range(6)]

    def exhausted(*_: object, **__: object) -> NoReturn:
        raise MemoryError("own mistake")

    def cat(tensors: Sequence[Tensor], *others: Any) -> Tensor:
        return exhausted() if len(tensors[-1]) == 2000 and made else whole(tensors, *others)

    whole, made = torch.cat, list[int]()
    places: list[tuple[ga.Aggregator, Any, str, Any]] = [
        (ga.GradientAgreement(), own_part.Part, "sum", exhausted),
        (ga.GradientAgreement(match_norm="mean"), ranks, "statistics_of", exhausted),
        (ga.EqualAgreement(), ranks, "of_products", exhausted),
        (ga.EqualAgreement(), torch, "cat", cat),
        (ga.Mean(), own_part.Part, "times", exhausted),
    ]
    for (one, owner, name, instead), group in zip(places, groups, strict=False):
        spread = ga.distributed(one, group)
        spread(stack)
        made.append(1)
        start = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            if last:
                patch.setattr(owner, name, instead)
            words = "own mistake" if last else f"that rank {WORLD - 1} failed in the middle"
            with pytest.raises(MemoryError if last else RankLostError, match=words):
                spread(stack)
        assert time.monotonic() - start < 10
        made.clear()
        with pytest.raises(RankLostError, match=f"rank {WORLD - 1} failed in the middle"):
            spread(stack)
    check_same_bits(ga.distributed(ga.GradientAgreement())(stack))
    # What fails when the others have all that they need is told before the next step.
    spread = ga.distributed(ga.Mean(), groups[5])
    with pytest.MonkeyPatch.context() as patch:
        if last:
            patch.setattr(pipeline, "with_norm", exhausted)
            with pytest.raises(MemoryError, match="own mistake"):
                spread(stack)
        else:
            spread(stack)
    with pytest.raises(RankLostError, match=f"rank {WORLD - 1} failed in the middle"):
        spread(stack)

    def fails(_: object, *__: object) -> NoReturn:
        calls.append(1)
        raise RuntimeError("own mistake")

    calls, tasks = list[int](), {name: torch.ones(2, 4, 3) for name in ("support", "query")}
    maml = ga.MAML(loss_of, ga.InnerSGD(0.1, 1))  # whose steps try a second engine
    with pytest.MonkeyPatch.context() as patch:
        if last:
            patch.setattr(own_part.Part, "sum", fails)
        with pytest.raises(RuntimeError, match="own mistake" if last else "failed in the middle"):
            maml.step(PARAMS, tasks, ga.distributed(ga.GradientAgreement()))
    assert len(calls) == last


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
