"""Decide: pure functions from the statistics of n tasks to n weights.

A weighting works on the last axis, so the same code weights all parameters at once or one group
of them at a time. Its fields are its options; it holds no state.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.statistics import Statistics


class Decision(NamedTuple):
    """Weights of n tasks, the scores they come from, and where the scores say nothing."""

    weights: Float[Tensor, "*groups n"]
    scores: Float[Tensor, "*groups n"]
    degenerate: Bool[Tensor, "*groups"]


@runtime_checkable
class Weighting(Protocol):
    """What an aggregator asks of a weighting."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional statistics it reads.

        They are "squared_norms", "relative_norms", "other_row_sums", "cosine_row_sums" (and with
        these "nonzero"), "cosines" (and with these "relative_norms"), "draws" and "gramian"; and
        "directions" where no weights tell the update, so that the aggregator reads the directions
        one by one.
        """

    def __call__(self, statistics: Statistics, /) -> Decision:
        """The weights of the tasks."""


@dataclass(frozen=True)
class UniformWeighting:
    """The same weight for every task: 1/n for the mean, 1 for the sum."""

    needs: ClassVar[frozenset[str]] = frozenset()
    total: Literal["mean", "sum"] = "mean"

    def __call__(self, statistics: Statistics, /) -> Decision:
        weights = uniform(statistics)
        if self.total == "sum":
            weights = (weights > 0).to(weights.dtype)
        return plain_decision(weights, statistics)


def uniform(statistics: Statistics, /) -> Float[Tensor, "*groups n"]:
    """1/n for every active task, 0 for the others."""
    active = statistics.active.to(statistics.row_sums.dtype)
    return (active / active.sum().clamp(min=1)).expand_as(statistics.row_sums)


def in_squared_units(values: Tensor, statistics: Statistics, /) -> Tensor:
    """Values in units of scale² in those of the signals; scale² itself may overflow."""
    scale = statistics.scale.unsqueeze(-1)
    return values * scale * scale


def plain_decision(weights: Tensor, statistics: Statistics) -> Decision:
    """Weights that do not come from scores, beside the agreement scores of the same tasks."""
    scores = in_squared_units(statistics.row_sums, statistics)
    return Decision(weights, scores, torch.zeros_like(statistics.scale, dtype=torch.bool))
