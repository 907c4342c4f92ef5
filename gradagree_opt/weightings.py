"""Decide: pure functions from the statistics of n tasks to n weights.

A weighting works on the last axis, so the same code weights all parameters at once or one group
of them at a time. Its fields are its options; it holds no state.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.statistics import Statistics

AN_AGGREGATOR = "an aggregator as gradagree_opt.Sum()"
"""What match_norm takes besides words, for the messages."""


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
        if not self.temperature > 0:
            raise ValueError(
                f"expected a positive temperature, found {self.temperature!r}; "
                "small values sharpen the weights, large ones flatten them"
            )

    @property
    def needs(self) -> frozenset[str]:
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
        weights = logits.masked_fill(~active, float("-inf")).softmax(-1)
        return torch.where(active, weights, torch.zeros_like(weights))


@dataclass(frozen=True)
class ConstantWeighting:
    """The same weight for every task: 1/n for the mean, 1 for the sum."""

    needs: ClassVar[frozenset[str]] = frozenset()
    total: Literal["mean", "sum"] = "mean"

    def __call__(self, statistics: Statistics, /) -> Decision:
        weights = uniform(statistics)
        if self.total == "sum":
            weights = (weights > 0).to(weights.dtype)
        return plain_decision(weights, statistics)


@dataclass(frozen=True)
class NormShareWeighting:
    """w_i = ‖g_i‖² / Σ_j ‖g_j‖²: where agreement tends among nearly orthogonal tasks."""

    needs: ClassVar[frozenset[str]] = frozenset({"squared_norms"})

    def __call__(self, statistics: Statistics, /) -> Decision:
        norms = statistics.squared_norms
        assert norms is not None
        total = norms.sum(-1, keepdim=True)
        shares = norms / torch.where(total == 0, torch.ones_like(total), total)
        return plain_decision(torch.where(total == 0, uniform(statistics), shares), statistics)


@dataclass(frozen=True)
class RandomWeighting:
    """Uniform on the weights that are positive and sum to 1: exponential draws over their sum."""

    needs: ClassVar[frozenset[str]] = frozenset({"draws"})

    def __call__(self, statistics: Statistics, /) -> Decision:
        assert statistics.draws is not None
        draws = statistics.draws * statistics.active
        weights = draws / draws.sum().clamp(min=torch.finfo(draws.dtype).tiny)
        return plain_decision(weights.expand_as(statistics.row_sums), statistics)


def uniform(statistics: Statistics, /) -> Float[Tensor, "*groups n"]:
    """1/n for every active task, 0 for the others."""
    active = statistics.active.to(statistics.row_sums.dtype)
    return (active / active.sum().clamp(min=1)).expand_as(statistics.row_sums)


def in_squared_units(values: Tensor, statistics: Statistics, /) -> Tensor:
    """Values in units of scale² in those of the signals; scale² itself may overflow."""
    scale = statistics.scale.unsqueeze(-1)
    return values * scale * scale


def check_choice(option: str, value: object, choices: tuple[object, ...], /, *others: str) -> None:
    """ValueError in one sentence unless the value is one of the choices.

    ``others`` say in words what else the caller takes, and has looked for.
    """
    if value not in choices:
        expected = ", ".join([*(repr(choice) for choice in choices), *others])
        raise ValueError(f"expected {option} to be one of {expected}; found {value!r}")


def check_positive(option: str, value: object, /) -> None:
    """ValueError in one sentence unless the value is a positive finite number."""
    if not is_finite_number(value) or not value > 0:
        raise ValueError(
            f"expected a positive number for {option}, found {value!r}; give an int or a float "
            "above 0"
        )


def is_finite_number(value: object, /) -> TypeGuard[int | float]:
    """Whether it is an int or a float, not a bool, that a float holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def plain_decision(weights: Tensor, statistics: Statistics) -> Decision:
    """Weights that do not come from scores, beside the agreement scores of the same tasks."""
    scores = in_squared_units(statistics.row_sums, statistics)
    return Decision(weights, scores, torch.zeros_like(statistics.scale, dtype=torch.bool))


def _rounding(terms: Tensor) -> Tensor:
    """What Σ|s_i| can be from rounding alone, as its terms cancel.

    Each entry of Σ g_j carries about √n roundings, so the scores of n tasks stay below a small
    multiple of eps · √n · Σ‖g_i‖² when the exact sum is zero; of the other tasks alone, likewise
    with Σ_{j≠i} ‖g_i‖ ‖g_j‖.
    """
    eps = torch.finfo(terms.dtype).eps
    tolerance: float = 8 * eps * terms.shape[-1] ** 0.5
    return tolerance * terms.sum(-1, keepdim=True)
