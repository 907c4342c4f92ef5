"""Every aggregator that a contract is checked on, with the weights it should give."""

import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga
from gradagree_testing import reference
from gradagree_testing.reference import Array


@dataclass(frozen=True)
class Configuration:
    """A fresh aggregator, given a policy for non-finite tasks, and its weights from a Gram matrix.

    A configuration whose weights are random has no expected ones. Amplifying ones put the length
    of an update into the weights, and with it more rounding. ``scores`` are given where they are
    not the row sums, and ``rounding``, of weights and scores in units of eps, where it is another
    than that of shares of the row sums. ``magnifies`` says to how many eps of its length an update
    may be rounded. ``of_directions`` tells the methods made for the vectors that they combine.
    """

    name: str
    make: Callable[..., ga.Aggregator]
    weights: Callable[[Array], Array] | None
    options: dict[str, Any] = field(default_factory=dict)
    amplifies: bool = False
    scores: Callable[[Array], Array] | None = None
    rounding: Callable[[Array], tuple[Array, Array]] | None = None
    magnifies: float = 0.0
    of_directions: bool = False

    def __str__(self) -> str:
        return self.name

    def weigh(self, stack: Any, /) -> Tensor:
        """The expected weights of task-stacked signals, in float64."""
        rows = [leaf.detach().double().reshape(len(leaf), -1) for leaf in tree_leaves(stack)]
        gram = reference.gram(torch.cat(rows, 1).numpy())
        return torch.from_numpy(self.weights(gram).astype(float))

    def weigh_adapted(self, displacements: Any, gradients: Any, /) -> Tensor:
        """The expected weights of tasks that have adapted, in float64."""
        return self.weigh(gradients if self.of_directions else displacements)

    def combine(self, stack: Any, /) -> Any:
        """The expected update Σ_i w_i g_i of task-stacked signals, summed in float64."""
        weights = self.weigh(stack)
        return tree_map(lambda leaf: torch.tensordot(weights, leaf.double(), 1).to(leaf), stack)

    def tolerance(self, dtype: torch.dtype, /) -> float:
        """Share of its length by which an update may differ from the expected one, by rounding."""
        usual = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
        return max(usual, self.magnifies * torch.finfo(dtype).eps)


OWN = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "own_weighting.py"))
"""The example of a weighting of one's own, of the documentation."""

AXES: dict[str, tuple[Any, ...]] = {
    "similarity": ("inner", "cosine"),
    "include_self": (True, False),
    "negative": ("keep", "clip"),
    "normalization": ("l1", "softmax"),
}


def _agreement(**options: Any) -> Configuration:
    def make(**others: Any) -> ga.Aggregator:
        return ga.GradientAgreement(**options, **others)

    def weights(gram: Array) -> Array:
        return reference.agreement(gram, **options)

    return Configuration("-".join(map(str, options.values())) or "paper", make, weights, options)


AGREEMENTS = tuple(
    _agreement(**dict(zip(AXES, values, strict=True))) for values in product(*AXES.values())
)
PAPER = _agreement()


def _equal(**options: Any) -> Configuration:
    def make(**others: Any) -> ga.Aggregator:
        return ga.EqualAgreement(**options, **others)

    def rounding(gram: Array) -> tuple[Array, Array]:
        return _equal_rounding(gram, **options)

    return Configuration(
        "-".join(["equal", *map(str, options.values())]),
        make,
        lambda gram: reference.equal(gram, **options),
        options,
        scores=lambda gram: reference.equal_scores(gram, **options),
        rounding=rounding,
        magnifies=4 / options.get("damping", 0.01),
        of_directions=True,
    )


def _equal_rounding(
    gram: Array, *, damping: float = 0.01, similarity: str = "cosine"
) -> tuple[Array, Array]:
    """|M⁻¹| δM |v|, each product u_i · u_j rounded to eps; the weights', then the scores'."""
    matrix, norms = reference.damped(gram, damping, similarity), reference.relative_norms(gram)
    sizes = norms if similarity == "inner" else (norms > 0).astype(float)
    scores = abs(reference.equal_scores(gram, damping=damping, similarity=similarity))
    rounded = np.outer(sizes, sizes) / len(gram) + damping * np.eye(len(gram))
    rounding = 8 * (abs(np.linalg.inv(matrix)) @ rounded @ scores + scores)
    if similarity == "inner":
        return rounding, rounding
    return np.divide(rounding, norms, out=np.zeros(len(gram)), where=norms > 0), rounding


EQUAL = _equal()
EQUALS = (EQUAL, _equal(similarity="inner"), _equal(damping=1.0))
METHODS = (PAPER, EQUAL)
"""The paper's and ours, as they are without options."""


def _power(power: int) -> Configuration:
    def make(**others: Any) -> ga.Aggregator:
        return ga.GramianPower(power, **others)

    def rounding(gram: Array) -> tuple[Array, Array]:
        if power < 0:
            return _equal_rounding(gram, similarity="inner")
        size = np.full(len(gram), 32.0 * (1 + power))
        return size, size

    def weights(gram: Array) -> Array:
        if power < 0:
            return reference.equal(gram, similarity="inner")
        return reference.gramian_power(gram, power)

    return Configuration(
        f"power-{power}",
        make,
        weights,
        scores=weights,
        rounding=rounding,
        of_directions=power < 0,
    )


def _mean_at_equal(gram: Array) -> Array:
    return reference.with_norm_of(gram, reference.uniform(gram), reference.equal(gram))


def _mean_at_equal_rounding(gram: Array) -> tuple[Array, Array]:
    """The ratio of two lengths, each a sum of vectors that are rounded; row sums."""
    lengths = np.sqrt(np.diag(gram).astype(float))
    uniform, weights = reference.uniform(gram).astype(float), reference.equal(gram)
    long, short = reference.norm(gram, weights), reference.norm(gram, uniform)
    size = abs(_mean_at_equal(gram))
    if min(long, short) > 1e-12 * lengths.sum():
        of_equal = (_equal_rounding(gram)[0] + 8 * abs(weights)) @ lengths / long
        size = size * (16 + of_equal + 8 * uniform @ lengths / short)
    return size, 16 * lengths * lengths.sum()


def _median_rounding(gram: Array) -> tuple[Array, Array]:
    """Weights of distances, whose squares cancel; row sums."""
    lengths = np.sqrt(np.diag(gram).astype(float))
    weights = 1e4 * reference.geometric_median(gram).max()
    return np.full(len(gram), weights), 16 * lengths * lengths.sum()


CONFIGURATIONS = (
    PAPER,
    *AGREEMENTS[1:],
    _agreement(normalization="softmax", temperature=0.3),
    _agreement(degenerate="zero"),
    Configuration(
        "agreement-matched",
        lambda **others: ga.GradientAgreement(match_norm="mean", **others),
        lambda gram: reference.with_norm_of(
            gram, reference.agreement(gram), reference.uniform(gram)
        ),
        amplifies=True,
    ),
    Configuration("mean", ga.Mean, reference.uniform),
    Configuration(
        "mean-matched",
        lambda **others: ga.Mean(match_norm="agreement", **others),
        lambda gram: reference.with_norm_of(
            gram, reference.uniform(gram), reference.agreement(gram)
        ),
        amplifies=True,
    ),
    *EQUALS,
    Configuration(
        "mean-at-equal",
        lambda **others: ga.Mean(match_norm=ga.EqualAgreement(), **others),
        _mean_at_equal,
        amplifies=True,
        rounding=_mean_at_equal_rounding,
        of_directions=True,
    ),
    *map(_power, (-1, 0, 1, 2)),
    Configuration("norm-clipped", ga.NormClipped, reference.norm_clipped, of_directions=True),
    Configuration(
        "geometric-median",
        ga.GeometricMedian,
        reference.geometric_median,
        rounding=_median_rounding,
        of_directions=True,
    ),
    Configuration("sum", ga.Sum, lambda gram: reference.uniform(gram) * len(gram)),
    Configuration("norm-share", ga.NormShare, reference.norm_shares),
    Configuration("own", partial(ga.Aggregator, OWN["LengthShare"]()), reference.length_shares),
    Configuration(
        "random",
        lambda **others: ga.RandomWeights(torch.Generator().manual_seed(0), **others),
        None,
    ),
)
