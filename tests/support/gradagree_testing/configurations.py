"""Every aggregator that a contract is checked on, with the weights it should give."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

import gradagree_opt as ga
from gradagree_testing import reference
from gradagree_testing.reference import Array


@dataclass(frozen=True)
class Configuration:
    """A fresh aggregator, given a policy for non-finite tasks, and its weights from a Gram matrix.

    A configuration whose weights are random has no expected ones. Amplifying ones put the length
    of an update into the weights, and with it more rounding.
    """

    name: str
    make: Callable[..., ga.Aggregator]
    weights: Callable[[Array], Array] | None
    options: dict[str, Any] = field(default_factory=dict)
    amplifies: bool = False

    def __str__(self) -> str:
        return self.name


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
    Configuration("sum", ga.Sum, lambda gram: reference.uniform(gram) * len(gram)),
    Configuration("norm-share", ga.NormShare, reference.norm_shares),
    Configuration(
        "random",
        lambda **others: ga.RandomWeights(torch.Generator().manual_seed(0), **others),
        None,
    ),
)
