"""Means over seeds with Student-t intervals, and differences paired by seed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval, NaN for a single value."""

    mean: float
    half_width: float

    def scaled(self, factor: float) -> "Interval":
        return Interval(self.mean * factor, self.half_width * factor)

    def __format__(self, spec: str) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        mean = format(self.mean, spec)
        if math.isnan(self.half_width):
            return mean
        return f"{mean} ± {format(self.half_width, spec.lstrip('+'))}"


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
            float(sample.mean()), float(stats.t.ppf((1 + LEVEL) / 2, len(sample) - 1) * spread)
        )


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float], /) -> Interval:
    """The mean of ``values − baseline`` over seeds, both given by seed."""
    if values.keys() != baseline.keys():
        raise ValueError(f"expected the same seeds, found {sorted(values)} and {sorted(baseline)}")
    return interval([values[seed] - baseline[seed] for seed in sorted(values)])
