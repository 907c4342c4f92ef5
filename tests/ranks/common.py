"""What the programs of ranks share: how they join, what they compare, and how they end.

Each is run as ``python FILE NAME RANK WORLD STORE``. References are computed before the process
group is there, by one process with all tasks.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import gradagree_opt as ga

RANK, WORLD, STORE = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
AGGREGATORS = (
    ga.GradientAgreement(),
    ga.GradientAgreement(similarity="cosine"),
    ga.GradientAgreement(include_self=False),
    ga.GradientAgreement(scope="leaf"),
    ga.GradientAgreement(match_norm="mean"),
    ga.GradientAgreement(similarity="cosine", scope=lambda path: path[0], negative="clip"),
    ga.GradientAgreement(normalization="softmax", match_norm=ga.Sum()),
    ga.EqualAgreement(),
    ga.EqualAgreement(similarity="inner", scope="leaf"),
    ga.GramianPower(2),
    ga.Mean(),
    ga.Mean(match_norm=ga.EqualAgreement()),
    ga.Sum(),
    ga.NormShare(),
    ga.NormClipped(),
    ga.GeometricMedian(),
)


def join(timeout: float = 60, backend: str | None = "gloo", store: str = STORE) -> None:
    """The process group of this test."""
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=RANK,
        world_size=WORLD,
        timeout=timedelta(seconds=timeout),
    )


def check_same_bits(tree: Any) -> None:
    """Every rank holds the same numbers, to the bit."""
    own = [leaf.detach().numpy().tobytes() for leaf in tree_leaves(tree)]
    each: list[Any] = [None] * WORLD
    dist.all_gather_object(each, own)
    assert all(other == own for other in each)


def check_close(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    """Leaves that differ by rounding alone, relative to the largest entry of each."""
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        size = other.abs().amax() if other.numel() else 0
        assert bool(((one - other).abs() <= tolerance * size).all()), (one, other)


def check_close_together(found: Any, wanted: Any, tolerance: float) -> None:
    """Leaves that differ by rounding alone, relative to the largest entry of all."""
    size = max(float(leaf.abs().amax()) for leaf in tree_leaves(wanted))
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert bool(((one - other).abs() <= tolerance * size).all()), (one, other)


def own(weights: Tensor) -> Tensor:
    share: Tensor = ga.own_share(weights.movedim(-1, 0)).movedim(0, -1)
    return share


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A sentence that holds all parts, on this rank while the others have theirs."""
    dist.barrier()
    start = time.monotonic()
    with pytest.raises((ValueError, TypeError)) as caught:
        yield
    assert all(part in str(caught.value) for part in parts), caught.value
    # A rank that waits in vain would do so for the 60 s of the group's timeout.
    assert time.monotonic() - start < 20


def with_message(call: Callable[[], Any], part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)):
        call()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of every all-reduce in the block."""
    sent: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **options)

    dist.all_reduce = counting
    yield sent
    dist.all_reduce = reduce


def trained(
    model: Any,
    aggregator: Any,
    tasks: list[Tensor],
    optimizes: bool,
    prepare: Callable[..., Any] = lambda *made: made,
    clip: Callable[..., Any] = lambda *_: None,
) -> list[Any]:
    """Parameters after three steps, by TaskOptimizer or TaskBatch, and the last losses."""
    model, adam = prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    for _ in range(3):
        adam.zero_grad()
        if optimizes:
            losses = [model(x).square().mean() for x in tasks]
            result = ga.TaskOptimizer(adam, aggregator).step(losses)
        else:
            batch = ga.TaskBatch(model, aggregator)
            for x in tasks:
                batch.add(model(x).square().mean())
            result = batch.backward()
            clip(model.parameters(), 0.01)
            adam.step()
    return [[p.detach().clone() for p in model.parameters()], result.losses]


class Model(nn.Module):
    """A trunk, and a head that not every task uses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(3)])

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        result: Tensor = self.heads[head](self.trunk(x).tanh())
        return result


def loss_of(params: Any, batch: Tensor) -> Tensor:
    loss: Tensor = functional_call(MODEL, params, (batch,)).square().mean()
    return loss


MODEL = Model()


PARAMS = {name: p.detach() for name, p in MODEL.named_parameters()}


def leave() -> None:
    """Ends this rank once all have come to their end: gloo's threads may abort in a destructor."""
    Path(f"{STORE}.{RANK}").touch()
    while not all(Path(f"{STORE}.{rank}").exists() for rank in range(WORLD)):
        time.sleep(0.01)
    sys.stderr.flush()
    os._exit(0)
