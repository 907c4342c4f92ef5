"""Weightings from the reference formulas, applied to named tensors of one task after the other."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

import gradagree_opt as ga
from gradagree_testing import reference
from gradagree_testing.reference import Array

Named = dict[str, Tensor]
Weights = Callable[[Array], Array]
"""From the Gram matrix of the signals to the weights."""


def flat(tree: Any, prefix: str = "") -> Named:
    """Nested dicts as one dict whose names are joined by dots."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    named: Named = {}
    for key, branch in tree.items():
        named |= flat(branch, f"{prefix}.{key}" if prefix else key)
    return named


def vector(named: Named) -> list[float]:
    return [x for tensor in named.values() for x in tensor.detach().double().flatten().tolist()]


def length(named: Named) -> float:
    return math.hypot(*vector(named))


def gram(signals: list[Named]) -> Array:
    return reference.gram(np.array([vector(signal) for signal in signals]))


@dataclass(frozen=True)
class Rule:
    """An aggregator of the library, and the same from its definition.

    ``groups`` names the group of a parameter; ``length_of`` is the method whose length it takes.
    """

    aggregator: ga.Aggregator
    weights: Weights
    groups: Callable[[str], str] | None = None
    length_of: Weights | None = None

    def combine(self, signals: list[Named], directions: list[Named]) -> Named:
        """Σ_i w_i direction_i."""
        update = self._weighted(self.weights, signals, directions)
        if self.length_of is None:
            return update
        target = self._weighted(self.length_of, signals, directions)
        return {name: length(target) / length(update) * leaf for name, leaf in update.items()}

    def _weighted(self, rule: Weights, signals: list[Named], directions: list[Named]) -> Named:
        if self.groups is None:
            weights = dict.fromkeys(directions[0], rule(gram(signals)))
        else:
            members = defaultdict(list)
            for name in directions[0]:
                members[self.groups(name)].append(name)
            weights = {
                name: rule(gram([{name: signal[name] for name in names} for signal in signals]))
                for names in members.values()
                for name in names
            }
        return {
            name: sum(float(w) * d[name] for w, d in zip(weights[name], directions, strict=True))
            for name in directions[0]
        }


def agreement(**options: Any) -> Rule:
    return Rule(ga.GradientAgreement(**options), partial(reference.agreement, **options))


def by_layer(name: str) -> str:
    return "last layer" if name.endswith("2") else "first layer"


def total(gram: Array) -> Array:
    return np.ones(len(gram))


PAPER = agreement()
EQUAL = Rule(ga.EqualAgreement(), reference.equal)
MEAN = Rule(ga.Mean(), reference.uniform)
RULES = {
    "mean": MEAN,
    "mean, longer": Rule(
        ga.Mean(match_norm="agreement"), reference.uniform, length_of=reference.agreement
    ),
    "sum": Rule(ga.Sum(), total),
    "norm share": Rule(ga.NormShare(), reference.norm_shares),
    "agreement": PAPER,
    "drop": Rule(ga.GradientAgreement(nonfinite="drop"), reference.agreement),
    "propagate": Rule(ga.GradientAgreement(nonfinite="propagate"), reference.agreement),
    "cosine": agreement(similarity="cosine"),
    "others": agreement(include_self=False),
    "clip": agreement(negative="clip"),
    "softmax": agreement(normalization="softmax", temperature=0.5),
    "shorter": Rule(
        ga.GradientAgreement(match_norm="mean"), reference.agreement, length_of=reference.uniform
    ),
    "equal": EQUAL,
    "equal, inner": Rule(
        ga.EqualAgreement(similarity="inner", damping=0.1),
        partial(reference.equal, similarity="inner", damping=0.1),
    ),
    "equal, drop": Rule(ga.EqualAgreement(nonfinite="drop"), reference.equal),
    "equal, shorter": Rule(
        ga.EqualAgreement(match_norm="mean"), reference.equal, length_of=reference.uniform
    ),
    "mean, as long as equal": Rule(
        ga.Mean(match_norm=ga.EqualAgreement()), reference.uniform, length_of=reference.equal
    ),
    "second power": Rule(ga.GramianPower(2), partial(reference.gramian_power, power=2)),
    "norm clipped": Rule(ga.NormClipped(), reference.norm_clipped),
    "geometric median": Rule(ga.GeometricMedian(), reference.geometric_median),
}
GROUPED_RULES = {
    "leaf": Rule(ga.GradientAgreement(scope="leaf"), reference.agreement, groups=str),
    "layer": Rule(ga.GradientAgreement(scope=by_layer), reference.agreement, groups=by_layer),
    "equal, leaf": Rule(
        ga.EqualAgreement(scope="leaf", damping=0.1),
        partial(reference.equal, damping=0.1),
        groups=str,
    ),
    "leaf, drop": Rule(
        ga.GradientAgreement(scope="leaf", nonfinite="drop"), reference.agreement, groups=str
    ),
    "layer, shorter": Rule(
        ga.GradientAgreement(scope=by_layer, match_norm="mean"),
        reference.agreement,
        groups=by_layer,
        length_of=reference.uniform,
    ),
}
