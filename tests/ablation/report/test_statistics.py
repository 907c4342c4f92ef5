"""Intervals and paired differences against scipy and numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from gradagree_opt.ablation.report.significance import (
    Interval,
    compare,
    effect_size,
    holm,
    interval,
    p_value,
    paired_differences,
)


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
    found = interval(paired_differences(ours, theirs))
    assert found.mean - found.half_width == pytest.approx(expected.confidence_interval().low)
    assert found.half_width < interval(list(ours.values())).half_width / 10


def test_seeds_that_differ_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"same seeds, found \[0, 1\] and \[0, 2\]"):
        paired_differences({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0})


@pytest.mark.parametrize("values", [[1.0, math.inf], [math.inf, math.inf], [math.inf]])
def test_a_diverged_run_is_shown_as_such(values: list[float]) -> None:
    assert f"{interval(values):.3f}" == "diverged"


def test_a_sign_is_shown_for_the_mean_alone() -> None:
    assert f"{Interval(0.5, 0.25):+.2f}" == "+0.50 ± 0.25"
    assert Interval(0.5, 0.25).scaled(100.0) == (50, 25)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_p_value_is_that_of_scipys_paired_test(seed: int, n: int) -> None:
    ours, theirs = np.random.default_rng(seed).normal([[0.3], [0]], size=(2, n))
    expected = stats.ttest_rel(ours, theirs).pvalue
    assert p_value(list(ours - theirs)) == pytest.approx(expected, rel=1e-9)


def test_the_p_value_of_two_differences_by_hand() -> None:
    # t = 1.5 / 0.5 = 3 with one degree of freedom, Cauchy's distribution: 1 - 2 atan(3) / π
    assert p_value([1.0, 2.0]) == pytest.approx(1 - 2 * math.atan(3) / math.pi)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, math.inf], [math.nan, 1.0, 2.0]])
def test_there_is_no_p_value_of_fewer_than_two_seeds_nor_of_diverged_runs(
    values: list[float],
) -> None:
    assert math.isnan(p_value(values)) and math.isnan(effect_size(values))


def test_a_method_compared_with_itself_does_not_differ() -> None:
    scores = {seed: 0.1 * seed for seed in range(5)}
    found = compare({"mean": scores, "average": dict(scores)}, "mean")["average"]
    assert found.difference == (0, 0)
    assert (found.p, found.adjusted_p, found.effect_size) == (1, 1, 0)


def test_a_difference_that_is_the_same_for_every_seed_is_certain() -> None:
    for value in (0.5, 0.1):  # three times 0.1 is not 0.3: their mean is not exactly 0.1
        assert p_value([value] * 3) == 0
        assert effect_size([-value] * 3) == -math.inf


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        # by hand: sorted, times 4, 3, 2 and 1; 0.03 · 3 = 0.09, then 0.04 · 2 = 0.08 becomes 0.09
        ([0.04, 0.01, 0.03, 0.5], [0.09, 0.04, 0.09, 0.5]),
        ([0.005, 0.005], [0.01, 0.01]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([math.nan, 0.02, math.nan, 0.01], [math.nan, 0.02, math.nan, 0.02]),
        ([], []),
    ],
)
def test_holms_method_by_hand(p_values: list[float], expected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("seed", range(20))
def test_holm_rejects_what_its_step_down_procedure_rejects(seed: int) -> None:
    p_values = list(np.random.default_rng(seed).uniform(0, 0.06, size=6))
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.1):
        rejected, left = set(), set(range(6))
        while left:
            smallest = min(left, key=lambda place: p_values[place])
            if p_values[smallest] > level / len(left):
                break
            rejected.add(smallest)
            left.remove(smallest)
        assert rejected == {place for place in range(6) if adjusted[place] <= level}


def test_the_effect_size_by_hand() -> None:
    # mean 2, deviation √(2/3); of four seeds Γ(3/2) / (√(3/2) Γ(1)) = √π / 2 / √(3/2)
    expected = 2 / math.sqrt(2 / 3) * math.sqrt(math.pi) / 2 / math.sqrt(3 / 2)
    assert effect_size([1.0, 2.0, 3.0, 2.0]) == pytest.approx(expected)
    assert effect_size([-1.0, -2.0, -3.0, -2.0]) == pytest.approx(-expected)
    assert math.isnan(effect_size([1.0, 2.0]))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_effect_size_has_no_bias_where_cohens_has(n: int) -> None:
    draws = np.random.default_rng(0).normal(0.8, 1, size=(20_000, n))
    corrected = np.array([effect_size(list(row)) for row in draws])
    plain = draws.mean(1) / draws.std(1, ddof=1)
    error = corrected.std() / math.sqrt(len(draws))
    assert abs(corrected.mean() - 0.8) < 5 * error
    assert plain.mean() - 0.8 > 5 * plain.std() / math.sqrt(len(draws))


def test_methods_are_compared_by_seed_and_adjusted_together() -> None:
    rng = np.random.default_rng(1)
    scores = {
        name: dict(zip([7, 3, 5, 1], rng.normal(shift, 1, 4), strict=True))
        for name, shift in (("a", 0.5), ("mean", 0), ("b", 3))
    }
    scores["lost"] = dict.fromkeys([1, 3, 5, 7], math.inf)
    found = compare(scores, "mean")
    assert list(found) == ["a", "b", "lost"]
    raw = {
        name: stats.ttest_rel(
            [scores[name][seed] for seed in (1, 3, 5, 7)],
            [scores["mean"][seed] for seed in (1, 3, 5, 7)],
        ).pvalue
        for name in "ab"
    }
    assert [found[name].p for name in "ab"] == pytest.approx(list(raw.values()))
    smaller = min(raw, key=lambda name: raw[name])
    assert found[smaller].adjusted_p == pytest.approx(min(1, 2 * raw[smaller]))
    assert math.isnan(found["lost"].p) and math.isnan(found["lost"].adjusted_p)
