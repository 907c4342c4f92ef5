"""Controls: methods that a weighting of tasks has to beat, each beside its aggregator."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.agreement import GradientAgreement
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.matching import AN_AGGREGATOR, check_made
from gradagree_opt.core.pipeline import Nonfinite, check_generator
from gradagree_opt.core.scopes import Scope
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.weightings import Decision, Need, UniformWeighting, plain_decision, uniform
from gradagree_opt.options import check_choice


class Mean(Aggregator):
    """The plain average over tasks: what Gradient Agreement is swapped in for.

    Args:
        match_norm: an aggregator, whose update's length the mean's direction gets: the control that
            tells a method from the size of its steps. "agreement" is Gradient Agreement, whose step
            is never shorter than the mean's. The norm is that over all parameters.
        nonfinite: as in :class:`GradientAgreement`; that of match_norm is not asked.

    Raises:
        ValueError: match_norm is of another kind, has a match_norm of its own or
            degenerate="raise", or is one of TorchJD's that give no weights.

    >>> import gradagree_opt as ga
    >>> ga.Mean()(torch.tensor([[2.0], [4.0]]))
    tensor([3.])
    >>> ga.Mean(match_norm=ga.Sum())(torch.tensor([[2.0], [4.0]]))
    tensor([6.])
    """

    def __init__(
        self,
        *,
        match_norm: Literal["agreement"] | Aggregator | None = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        check_made(match_norm, f"match_norm with {AN_AGGREGATOR}")
        if isinstance(match_norm, str) and match_norm == "agreement":
            match_norm = GradientAgreement()
        scope: Scope = "global"
        if isinstance(match_norm, Aggregator):
            scope = match_norm.scope
        else:
            check_choice("match_norm", match_norm, (None, "agreement"), AN_AGGREGATOR)
        super().__init__(
            UniformWeighting("mean"), scope=scope, match_norm=match_norm, nonfinite=nonfinite
        )


class Sum(Aggregator):
    """The sum over tasks; its outer rate is n times smaller than the mean's.

    >>> import gradagree_opt as ga
    >>> ga.Sum()(torch.tensor([[2.0], [4.0]]))
    tensor([6.])
    """

    def __init__(self, *, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(UniformWeighting("sum"), nonfinite=nonfinite)


@dataclass(frozen=True)
class NormShareWeighting:
    """w_i = ‖g_i‖² / Σ_j ‖g_j‖²: where agreement tends among nearly orthogonal tasks."""

    needs: ClassVar[frozenset[Need]] = frozenset({"squared_norms"})

    def __call__(self, statistics: Statistics, /) -> Decision:
        norms = statistics.squared_norms
        assert norms is not None
        total = norms.sum(-1, keepdim=True)
        shares = norms / or_one(total)
        return plain_decision(torch.where(total == 0, uniform(statistics), shares), statistics)


class NormShare(Aggregator):
    """Control: w_i = ‖g_i‖² / Σ_j ‖g_j‖², Gradient Agreement's limit for orthogonal tasks.

    >>> import gradagree_opt as ga
    >>> ga.NormShare().aggregate(torch.tensor([[1.0], [3.0]])).weights
    tensor([0.1000, 0.9000])
    """

    def __init__(self, *, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(NormShareWeighting(), nonfinite=nonfinite)


@dataclass(frozen=True)
class RandomWeighting:
    """Uniform on the weights that are positive and sum to 1: exponential draws over their sum."""

    needs: ClassVar[frozenset[Need]] = frozenset({"draws"})
    reads_signal: ClassVar[bool] = False

    def __call__(self, statistics: Statistics, /) -> Decision:
        assert statistics.draws is not None
        draws = statistics.draws * statistics.active
        weights = draws / draws.sum().clamp(min=torch.finfo(draws.dtype).tiny)
        return plain_decision(weights.expand_as(statistics.row_sums), statistics)


class RandomWeights(Aggregator):
    """Control: positive random weights of sum 1, drawn anew for every batch.

    The weights are uniform on the simplex (exponential draws over their sum).

    Args:
        generator: source of the draws.

    >>> import gradagree_opt as ga
    >>> random = ga.RandomWeights(torch.Generator().manual_seed(0))
    >>> float(random.aggregate(torch.ones(4, 2)).weights.sum().round(decimals=6))
    1.0
    """

    def __init__(self, generator: torch.Generator, /, *, nonfinite: Nonfinite = "raise") -> None:
        check_generator(generator)
        super().__init__(RandomWeighting(), nonfinite=nonfinite, generator=generator)
