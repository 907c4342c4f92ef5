"""Programs that count what a step sends."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RANK, WORLD, Model, check_same_bits, counted, join, leave

import gradagree_opt as ga

D, N = 100_000, 2 * WORLD


def check_sent(cases: Iterable[tuple[Any, int, int]]) -> None:
    """Vectors and messages of a step, with tasks on all ranks and on the first alone."""
    stack = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    for one, vectors, count in cases:
        for tasks in (ga.own_share(stack), stack[:0] if RANK else stack):
            with counted() as sent:
                found = ga.distributed(one)(tasks)
            assert sum(sent) <= (vectors + 0.05) * 4 * D, (one, sum(sent) / 4 / D)
            assert len(sent) == count, (one, len(sent))
            check_same_bits(found)


def messages() -> None:
    """Four of them, three for equal weights, and a fifth where no message tells match_norm's."""
    join()
    draws = torch.Generator().manual_seed(0)
    check_sent(
        (
            (ga.GradientAgreement(), 2, 4),
            (ga.GradientAgreement(similarity="cosine"), 3, 4),
            (ga.GradientAgreement(include_self=False), 3, 4),
            (ga.GradientAgreement(scope="leaf"), 2, 4),
            (ga.NormClipped(), 2, 4),
            (ga.Mean(), 1, 3),
            (ga.Sum(nonfinite="drop"), 1, 3),
            (ga.Mean(match_norm=ga.Sum()), 1, 3),
            (ga.RandomWeights(draws), 2, 4),
            (ga.Aggregator(lambda statistics: statistics.row_sums), 2, 4),
            (ga.GradientAgreement(match_norm="mean"), 2, 4),
            (ga.GradientAgreement(similarity="cosine", match_norm=ga.Sum()), 3, 4),
            (ga.Mean(match_norm="agreement"), 3, 5),
            (ga.EqualAgreement(), N + 1, 4),
            (ga.EqualAgreement(match_norm="mean"), N + 2, 5),
        )
    )
    for one, messages in ((ga.GradientAgreement(), 4), (ga.Mean(), 3)):
        model = Model()
        for count in (1 + RANK, 0 if RANK else 2):
            batch = ga.TaskBatch(model, ga.distributed(one))
            for x in torch.ones(count, 4, 3):
                batch.add(model(x, head=1 + RANK).square().mean())
            with counted() as sent:
                batch.backward()
            assert len(sent) == messages, len(sent)
        found = [p.grad is not None for p in model.parameters()]
        assert found == [True, True, False, False, True, True, True, True]
    stack = torch.randn(2, D)
    with counted() as sent:  # signals beside the directions
        ga.distributed(ga.GradientAgreement(match_norm="mean")).aggregate(stack, stack + 1)
    assert len(sent) == 5


def messages_of_the_first_rank() -> None:
    """Its decision, and its Gram matrix and factor where they are due, if another is unlike it."""
    join()
    torch.set_num_threads(1 + RANK)
    check_sent(
        (
            (ga.GradientAgreement(), 2, 5),
            (ga.GradientAgreement(match_norm="mean"), 2, 6),
            (ga.Mean(), 1, 4),
            (ga.Mean(match_norm="agreement"), 3, 7),
            (ga.EqualAgreement(), N + 1, 6),
        )
    )


def bytes_on_loopback() -> None:
    """What passes the network of this namespace in one step: two vectors, and little else."""
    join()
    d = 1_000_000
    stack = torch.randn(2, d)
    agree = ga.distributed(ga.GradientAgreement())
    agree(stack)

    def passed() -> int:
        dist.barrier()
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
        (loopback,) = [line.split(":")[1] for line in lines if line.strip().startswith("lo:")]
        dist.barrier()
        return int(loopback.split()[0])

    before = passed()
    agree(stack)
    vectors = 2 * 2 * (WORLD - 1) * 4 * d
    assert vectors <= passed() - before <= 1.05 * vectors


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
