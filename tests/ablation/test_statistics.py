"""Intervals and paired differences against scipy and numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from gradagree_opt.ablation.statistics import Interval, interval, paired_difference


def test_the_interval_is_students() -> None:
    values = [0.055, 0.061, 0.049, 0.07, 0.058]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)


def test_the_interval_of_two_values_by_hand() -> None:
    # t(0.975, 1) = tan(0.475 π); standard error of {1, 2} is 1/2
    assert interval([1.0, 2.0]) == pytest.approx((1.5, math.tan(0.475 * math.pi) / 2))


def test_a_single_value_has_no_interval() -> None:
    found = interval([0.25])
    assert found.mean == 0.25
    assert math.isnan(found.half_width)
    assert f"{found:.2f}" == "0.25"


def test_pairing_removes_what_the_seeds_have_in_common() -> None:
    rng = np.random.default_rng(0)
    common, noise = rng.normal(size=8), rng.normal(size=8)
    ours = {seed: 10 * common[seed] + 0.1 * noise[seed] - 1 for seed in range(8)}
    theirs = {seed: 10 * common[seed] for seed in reversed(range(8))}
    order = range(8)
    expected = stats.ttest_rel([ours[s] for s in order], [theirs[s] for s in order])
    found = paired_difference(ours, theirs)
    assert found.mean - found.half_width == pytest.approx(expected.confidence_interval().low)
    assert found.half_width < interval(list(ours.values())).half_width / 10


def test_seeds_that_differ_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"same seeds, found \[0, 1\] and \[0, 2\]"):
        paired_difference({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0})


@pytest.mark.parametrize("values", [[1.0, math.inf], [math.inf, math.inf], [math.inf]])
def test_a_diverged_run_is_shown_as_such(values: list[float]) -> None:
    assert f"{interval(values):.3f}" == "diverged"


def test_a_sign_is_shown_for_the_mean_alone() -> None:
    assert f"{Interval(0.5, 0.25):+.2f}" == "+0.50 ± 0.25"
    assert Interval(0.5, 0.25).scaled(100.0) == (50, 25)
