"""Gradient Agreement: its weighting, its aggregator, and its weights alone."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.pipeline import Nonfinite
from gradagree_opt.core.scopes import Scope
from gradagree_opt.core.stacks import PyTree, check_stack
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.weightings import Decision, Need, in_squared_units, uniform
from gradagree_opt.options import check_choice, check_positive


@dataclass(frozen=True)
class AgreementWeighting:
    """w_i = s_i / Σ_k |s_k| (Eshratifar et al. 2018, equation of the task weights) and its axes.

    The options are those of :class:`gradagree_opt.GradientAgreement`.
    """

    similarity: Literal["inner", "cosine"] = "inner"
    include_self: bool = True
    negative: Literal["keep", "clip"] = "keep"
    normalization: Literal["l1", "softmax"] = "l1"
    temperature: float = 1.0
    degenerate: Literal["uniform", "zero", "raise"] = "uniform"

    def __post_init__(self) -> None:
        check_choice("similarity", self.similarity, ("inner", "cosine"))
        check_choice("include_self", self.include_self, (True, False))
        check_choice("negative", self.negative, ("keep", "clip"))
        check_choice("normalization", self.normalization, ("l1", "softmax"))
        check_choice("degenerate", self.degenerate, ("uniform", "zero", "raise"))
        check_positive("temperature", self.temperature)

    @property
    def needs(self) -> frozenset[Need]:
        if self.similarity == "cosine":
            return frozenset({"cosine_row_sums"})
        return frozenset(() if self.include_self else {"other_row_sums", "squared_norms"})

    def __call__(self, statistics: Statistics, /) -> Decision:
        scores, terms = self._scores(statistics)
        if self.negative == "clip":
            scores = scores.clamp(min=0)
        total = scores.abs().sum(-1, keepdim=True)
        degenerate = total - _rounding(terms) <= 0  # of two infinities it is not
        shares = scores / total
        if self.normalization == "softmax":
            shares = self._softmax(shares, statistics.active)
        fallback = uniform(statistics)
        if self.degenerate == "zero":
            fallback = torch.zeros_like(fallback)
        weights = torch.where(degenerate, fallback, shares)
        if self.similarity == "inner":
            scores = in_squared_units(scores, statistics)
        return Decision(weights, scores, degenerate.squeeze(-1))

    def _scores(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Σ_j g_i · g_j of every task, and the size of the terms, by which it is rounded."""
        norms = statistics.squared_norms
        if self.similarity == "cosine":
            scores = statistics.cosine_row_sums
            assert scores is not None and statistics.nonzero is not None
            own = statistics.nonzero.to(scores.dtype)
            return (scores if self.include_self else scores - own), own
        if self.include_self:
            scores = statistics.row_sums
            return scores, torch.zeros_like(scores) if norms is None else norms
        assert statistics.other_row_sums is not None and norms is not None
        lengths = norms.sqrt()
        products = lengths.unsqueeze(-1) * lengths.unsqueeze(-2)
        return statistics.other_row_sums, products.sum(-1) - lengths.square()

    def _softmax(self, shares: Tensor, active: Tensor) -> Tensor:
        """Softmax of the scores in units of their mean absolute value, so of no scale."""
        logits = shares * active.sum() / self.temperature
        return logits.masked_fill(~active, -torch.inf).softmax(-1).masked_fill(~active, 0)


class GradientAgreement(Aggregator):
    """Weights each task by how well its signal agrees with the others: w_i = s_i / Σ_k |s_k|.

    The defaults are the paper's method; every option is one axis of an ablation. The weights are
    constants of differentiation, and Σ|w_i| = 1, so that the update is a weighted *sum* which
    already carries the 1/n.

    Args:
        similarity: "inner", s_i = Σ_j g_i · g_j (paper); "cosine": every g_i has unit norm first,
            so a large task has no more say than a small one.
        include_self: False leaves the j = i term out of the sum.
        negative: "keep" (paper): a task that disagrees is ascended; "clip": its score becomes 0.
        normalization: "l1" (paper); "softmax" of the scores in units of their mean absolute value.
        temperature: of the softmax.
        scope: "global", one weight a task over all parameters (paper); "leaf", one for each
            parameter tensor; or a callable from a leaf's path to the name of its group.
        match_norm: None (paper); "mean" or an aggregator of the same scope: rescale the update to
            the norm of that one's.
        degenerate: where the scores cancel up to rounding (all g_i zero, or Σ g_i = 0): "uniform"
            weights, "zero" weights, or "raise".
        nonfinite: tasks with NaN or inf: "raise" names them, "drop" gives them weight 0,
            "propagate" looks at nothing: for GradScaler, vmap and torch.compile.

    Raises:
        ValueError: an option has none of these values.

    Source: Eshratifar, Eigen, Pedram 2018 (arXiv:1810.08178), algorithm 1. The paper is silent on
    include_self=False, scope, degenerate and nonfinite; the other options are ours.

    >>> import gradagree_opt as ga
    >>> grads = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    >>> ga.GradientAgreement()(grads)
    tensor([1.6667, 0.3333])
    >>> ga.GradientAgreement(negative="clip").aggregate(grads).weights
    tensor([0.6667, 0.3333, 0.0000])
    """

    def __init__(
        self,
        *,
        similarity: Literal["inner", "cosine"] = "inner",
        include_self: bool = True,
        negative: Literal["keep", "clip"] = "keep",
        normalization: Literal["l1", "softmax"] = "l1",
        temperature: float = 1.0,
        scope: Scope = "global",
        match_norm: Literal["mean"] | Aggregator | None = None,
        degenerate: Literal["uniform", "zero", "raise"] = "uniform",
        nonfinite: Nonfinite = "raise",
    ) -> None:
        weighting = AgreementWeighting(
            similarity=similarity,
            include_self=include_self,
            negative=negative,
            normalization=normalization,
            temperature=temperature,
            degenerate=degenerate,
        )
        super().__init__(weighting, scope=scope, match_norm=match_norm, nonfinite=nonfinite)


def agreement_weights(
    signal: PyTree,
    /,
    *,
    similarity: Literal["inner", "cosine"] = "inner",
    include_self: bool = True,
    negative: Literal["keep", "clip"] = "keep",
    normalization: Literal["l1", "softmax"] = "l1",
    temperature: float = 1.0,
    scope: Scope = "global",
    degenerate: Literal["uniform", "zero", "raise"] = "uniform",
    nonfinite: Nonfinite = "raise",
) -> Float[Tensor, "*groups n"]:
    """Gradient Agreement's weights ``[n]`` alone, without an update.

    Args:
        signal: task-stacked pytree, every leaf ``[n, *shape]``.
        similarity, include_self, negative, normalization, temperature, scope, degenerate,
            nonfinite: as in :class:`GradientAgreement`.

    Raises:
        ValueError, TypeError: as :meth:`gradagree_opt.Aggregator.aggregate`.

    >>> agreement_weights(torch.tensor([[1.0], [1.0], [-1.0]]))
    tensor([ 0.3333,  0.3333, -0.3333])
    """
    check_stack(signal, "signal")
    return (
        GradientAgreement(
            similarity=similarity,
            include_self=include_self,
            negative=negative,
            normalization=normalization,
            temperature=temperature,
            scope=scope,
            degenerate=degenerate,
            nonfinite=nonfinite,
        )
        .aggregate(signal)
        .weights
    )


def _rounding(terms: Tensor) -> Tensor:
    """What Σ|s_i| can be from rounding alone, as its terms cancel.

    Each entry of Σ g_j carries about √n roundings, so the scores of n tasks stay below a small
    multiple of eps · √n · Σ‖g_i‖² when the exact sum is zero; of the other tasks alone, likewise
    with Σ_{j≠i} ‖g_i‖ ‖g_j‖.
    """
    eps = torch.finfo(terms.dtype).eps
    tolerance: float = 8 * eps * terms.shape[-1] ** 0.5
    return tolerance * terms.sum(-1, keepdim=True)
