"""Aggregation alone, against reading the stack twice and writing the update once."""

from functools import partial

import torch
from torch import Tensor

import gradagree_opt as ga

from .timing import Bar, Case, Contestant, Step

TASKS, ENTRIES, LEAVES = 16, 10_000_000, 60
OURS, TRAFFIC = "gradagree", "read twice, write once"


def case() -> Case:
    stack = gradients()
    return Case(
        "aggregation",
        f"Aggregation alone: {TASKS} tasks, {ENTRIES // 10**6} million float32 entries in {LEAVES} "
        "leaves of unequal size",
        [
            Contestant(OURS, partial(aggregate, stack)),
            Contestant("one matrix, by hand", partial(by_hand, stack)),
            Contestant(TRAFFIC, partial(traffic, stack), comparable=False),
        ],
        [Bar(OURS, TRAFFIC, 1.3)],
    )


def gradients() -> dict[str, Tensor]:
    """Leaves whose sizes go up in one ratio, the largest 10 000 times the smallest."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    shares = torch.logspace(0, 4, LEAVES)
    sizes = (ENTRIES * shares / shares.sum()).int().tolist()
    return {
        f"{index:02}": torch.randn(TASKS, size, generator=generator) + 0.1
        for index, size in enumerate(sizes)
    }


def aggregate(stack: dict[str, Tensor]) -> Step:
    return partial(ga.GradientAgreement(), stack)


def by_hand(stack: dict[str, Tensor]) -> Step:
    """The leaves made one matrix, as a user would write it."""

    def step() -> Tensor:
        matrix = torch.cat(list(stack.values()), 1)
        scores = matrix @ matrix.sum(0)
        return scores / scores.abs().sum() @ matrix

    return step


def traffic(stack: dict[str, Tensor]) -> Step:
    """The sums of all leaves, twice, and a vector of the update's size."""
    into = torch.empty(ENTRIES)

    def step() -> None:
        for _ in range(2):
            for leaf in stack.values():
                leaf.sum()
        into.fill_(1.0)

    return step
