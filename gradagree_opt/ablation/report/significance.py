"""Means over seeds with Student-t intervals; differences paired by seed, their tests and size."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

LEVEL = 0.95
HUGE = 1e5
"""Numbers from here on are written as 1.234e+05: their decimals say nothing."""


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval, NaN for a single value.

    >>> f"{Interval(2.0, 0.5):.2f}, {Interval(1152133632.245, 99999.0):+.2f}"
    '2.00 ± 0.50, +1.152e+09 ± 99999.00'
    """

    mean: float
    half_width: float

    def scaled(self, factor: float) -> "Interval":
        return Interval(self.mean * factor, self.half_width * factor)

    def __format__(self, spec: str) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        mean = _number(self.mean, spec)
        if math.isnan(self.half_width):
            return mean
        return f"{mean} ± {_number(self.half_width, spec.lstrip('+'))}"


def _number(value: float, spec: str) -> str:
    return format(value, spec if abs(value) < HUGE else re.sub(r"\..*", ".3e", spec))


def interval(values: Sequence[float], /) -> Interval:
    """Mean and t · s/√n of independent values, one for each seed.

    >>> format(interval([1.0, 2.0, 3.0]), ".2f")
    '2.00 ± 2.48'
    """
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return Interval(float(sample.mean()), math.nan)
    with np.errstate(invalid="ignore"):  # a run that diverged has an infinite score
        spread = sample.std(ddof=1) / math.sqrt(len(sample))
        return Interval(
            float(sample.mean()), float(special.stdtrit(len(sample) - 1, (1 + LEVEL) / 2) * spread)
        )


class Comparison(NamedTuple):
    """A method's scores minus the baseline's, paired by seed.

    Attributes:
        difference: Its mean and 95 % interval.
        p: Of the two-sided paired t-test, for this method alone; NaN where there is no test.
        adjusted_p: By Holm's method, for all methods that are compared with the baseline.
        effect_size: Hedges' g_z, see :func:`effect_size`.
    """

    difference: Interval
    p: float
    adjusted_p: float
    effect_size: float


def compare(scores: Mapping[str, Mapping[int, float]], baseline: str, /) -> dict[str, Comparison]:
    """Each method but the baseline, compared with it.

    Args:
        scores: For each method its scores by seed, all of the same seeds.
    """
    differences = {
        name: paired_differences(values, scores[baseline])
        for name, values in scores.items()
        if name != baseline
    }
    p_values = [p_value(values) for values in differences.values()]
    return {
        name: Comparison(interval(values), p, adjusted_p, effect_size(values))
        for (name, values), p, adjusted_p in zip(
            differences.items(), p_values, holm(p_values), strict=True
        )
    }


def adjusted_together(groups: Sequence[Mapping[str, Comparison]], /) -> list[dict[str, Comparison]]:
    """The same comparisons, each p-value adjusted by Holm's method for those of all groups."""
    adjusted = iter(holm([found.p for group in groups for found in group.values()]))
    return [
        {name: found._replace(adjusted_p=next(adjusted)) for name, found in group.items()}
        for group in groups
    ]


def paired_differences(
    values: Mapping[int, float], baseline: Mapping[int, float], /
) -> list[float]:
    """``values − baseline`` seed by seed, both given by seed."""
    if values.keys() != baseline.keys():
        raise ValueError(f"expected the same seeds, found {sorted(values)} and {sorted(baseline)}")
    return [values[seed] - baseline[seed] for seed in sorted(values)]


def deviation(sample: "np.ndarray[Any, np.dtype[np.float64]]", /) -> float:
    """The standard deviation, 0 of equal values, whose mean may be rounded away from them.

    >>> deviation(np.array([0.1, 0.1, 0.1]))
    0.0
    """
    return float(sample.std(ddof=1)) if np.ptp(sample) else 0.0


def p_value(differences: Sequence[float], /) -> float:
    """Of the two-sided t-test that paired differences have mean 0.

    NaN for fewer than two, or where a run diverged. Differences that are all 0, as those of a
    method with itself, have p = 1.

    >>> format(p_value([1.0, 2.0, 3.0]), ".4f")
    '0.0742'
    """
    sample = np.asarray(differences, dtype=float)
    if len(sample) < 2 or not np.isfinite(sample).all():
        return math.nan
    spread = deviation(sample)
    if spread == 0:
        return float(sample[0] == 0)
    t = sample.mean() / (spread / math.sqrt(len(sample)))
    return float(2 * special.stdtr(len(sample) - 1, -abs(t)))


def holm(p_values: Sequence[float], /) -> list[float]:
    """P-values adjusted by Holm's step-down method, in the order given; NaN is no test and stays.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none becomes smaller than one
    before it, nor larger than 1. To call those below α different from the baseline is then wrong
    about any of them with probability α at most.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    tested = [place for place, p in enumerate(p_values) if not math.isnan(p)]
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, place in enumerate(sorted(tested, key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(tested) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def effect_size(differences: Sequence[float], /) -> float:
    """Hedges' g_z: the mean of paired differences in standard deviations, free of bias.

    Cohen's d_z times Γ(ν/2) / (√(ν/2) Γ((ν-1)/2)), ν = n - 1: from five seeds, d_z is a quarter too
    large in the mean. NaN for fewer than three, where nothing unbiased exists, and where a run
    diverged.

    Source: Hedges 1981 (correction); Lakens 2013 (d_z).

    >>> format(effect_size([1.0, 2.0, 3.0, 2.0]), ".3f")
    '1.772'
    """
    sample = np.asarray(differences, dtype=float)
    if len(sample) < 3 or not np.isfinite(sample).all():
        return math.nan
    mean, spread = float(sample.mean()), deviation(sample)
    if spread == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    half = (len(sample) - 1) / 2
    correction = math.exp(special.gammaln(half) - special.gammaln(half - 0.5)) / math.sqrt(half)
    return mean / spread * correction
