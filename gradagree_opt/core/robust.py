"""Baselines of robustness: norms clipped at their median, and the geometric median."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.pipeline import Nonfinite
from gradagree_opt.core.positive_definite import diagonal
from gradagree_opt.core.scopes import Scope
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.weightings import Decision, Need, plain_decision, uniform


@dataclass(frozen=True)
class NormClippedWeighting:
    """w_i = min(1, τ / ‖g_i‖) / n, τ the median norm of the tasks that are not zero."""

    needs: ClassVar[frozenset[Need]] = frozenset({"relative_norms"})
    measures_directions: ClassVar[bool] = True

    def __call__(self, statistics: Statistics, /) -> Decision:
        return plain_decision(clipped(statistics), statistics)


@dataclass(frozen=True)
class GeometricMedianWeighting:
    """w_i ∝ 1 / ‖g_i − m‖, m = Σ w_j g_j of the step before; first the mean of clipped norms."""

    needs: ClassVar[frozenset[Need]] = frozenset({"cosines"})
    measures_directions: ClassVar[bool] = True
    iterations: ClassVar[int] = 16
    smoothing: ClassVar[float] = 1e-3  # of the median norm: a distance below it counts as this one

    def __call__(self, statistics: Statistics, /) -> Decision:
        cosines, norms = statistics.cosines, statistics.relative_norms
        assert cosines is not None and norms is not None
        active = statistics.active
        gramian = cosines * norms.unsqueeze(-1) * norms.unsqueeze(-2)
        squares = diagonal(gramian)
        weights = clipped(statistics)
        for _ in range(self.iterations):
            products = (gramian @ weights.unsqueeze(-1)).squeeze(-1)
            square = (weights * products).sum(-1, keepdim=True)
            distances = (squares - 2 * products + square).clamp(min=self.smoothing**2).sqrt()
            closeness = torch.where(active, distances.reciprocal(), 0)
            weights = closeness / or_one(closeness.sum(-1, keepdim=True))
        return plain_decision(weights, statistics)


def clipped(statistics: Statistics, /) -> Float[Tensor, "*groups n"]:
    """The weights of the mean, with every norm above the median cut to it."""
    norms = statistics.relative_norms
    assert norms is not None
    return uniform(statistics) / torch.where(norms < 1, 1, norms)  # NaN stays, unlike by clamp


class NormClipped(Aggregator):
    """The mean of signals whose norms are cut to their median: w_i = min(1, τ / ‖g_i‖) / n.

    Args:
        scope: as in :class:`gradagree_opt.GradientAgreement`.
        match_norm: None; "mean" or an aggregator of the same scope: its update's norm.
        nonfinite: as in :class:`gradagree_opt.GradientAgreement`.

    >>> import gradagree_opt as ga
    >>> ga.NormClipped()(torch.tensor([[1.0], [2.0], [300.0]]))
    tensor([1.6667])
    """

    def __init__(
        self,
        *,
        scope: Scope = "global",
        match_norm: Literal["mean"] | Aggregator | None = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        weighting = NormClippedWeighting()
        super().__init__(weighting, scope=scope, match_norm=match_norm, nonfinite=nonfinite)


class GeometricMedian(Aggregator):
    """About the point of the smallest sum of distances to the signals, by Weiszfeld's algorithm.

    Sixteen steps from the mean of clipped norms, smoothed: a distance below a thousandth of the
    median norm counts as that. Distances come from the Gram matrix: in float32 no norm may be more
    than 1e18 times the median.

    Args:
        scope, match_norm, nonfinite: as in :class:`gradagree_opt.NormClipped`.

    Source: Weiszfeld 1937; Pillutla et al. 2022 (arXiv:1912.13445), algorithm 2, the smoothed form.

    >>> import gradagree_opt as ga
    >>> ga.GeometricMedian()(torch.tensor([[1.0], [2.0], [300.0]])).round()
    tensor([2.])
    """

    def __init__(
        self,
        *,
        scope: Scope = "global",
        match_norm: Literal["mean"] | Aggregator | None = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        weighting = GeometricMedianWeighting()
        super().__init__(weighting, scope=scope, match_norm=match_norm, nonfinite=nonfinite)
