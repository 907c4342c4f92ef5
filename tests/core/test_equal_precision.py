"""Equal Agreement in float32: its rounding, and signals and damping of extreme scales."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import gradagree_opt as ga
from gradagree_testing import reference

from .conftest import SIMILARITIES, median_norm, rows, units


@pytest.mark.parametrize("kind", ["independent", "nearly equal", "low rank"])
@pytest.mark.parametrize("damping", [1e-4, 0.01])
@pytest.mark.parametrize(("n", "d"), [(10, 50), (256, 300), (256, 20)])
def test_weights_in_float32_are_right_to_four_eps_over_the_damping(
    kind: str, damping: float, n: int, d: int
):
    signals = rows(n, d)
    if kind == "nearly equal":
        signals = 1 + 0.05 * signals
    if kind == "low rank":
        signals = rows(n, 5) @ rows(5, d, seed=1) + 1e-3 * signals
    signals = signals.float()
    scores = ga.EqualAgreement(damping=damping).aggregate(signals).scores.double()
    gram = reference.gram(signals.double().numpy())
    expected = torch.from_numpy(reference.equal_scores(gram, damping=damping))
    eps = torch.finfo(torch.float32).eps
    assert (scores - expected).norm() <= 4 * eps / damping * expected.norm()


@pytest.mark.parametrize("exponent", [*range(-36, 37, 6), 38])
def test_weights_at_every_scale_are_those_at_one(exponent: int):
    signals = rows(6, 90).float()
    for aggregator in (
        ga.EqualAgreement(),
        ga.EqualAgreement(similarity="inner"),
        ga.NormClipped(),
    ):
        expected = aggregator.aggregate(signals).weights
        scaled = signals * 10.0**exponent if exponent < 38 else signals / signals.abs().max() * 3e37
        assert_close(aggregator.aggregate(scaled).weights, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("exponent", range(-9, 16))
def test_agreement_is_known_beside_a_gram_matrix_at_every_scale(exponent: int):
    signals = rows(4, 30).float() * 10.0**exponent
    exact = signals.double()
    length = ga.GradientAgreement()(exact).norm()
    matched = ga.EqualAgreement(match_norm=ga.GradientAgreement())(signals).double()
    assert_close(matched.norm(), length, rtol=1e-5, atol=0)
    scores = ga.GeometricMedian().aggregate(signals).scores.double()
    assert_close(scores, exact @ exact.sum(0), rtol=1e-5, atol=1e-5 * scores.abs().max())


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("times", "held"), [(1e36, True), (1e38, True), (1e40, False)])
def test_a_norm_3e38_times_the_median_has_the_weight_zero_in_float32_and_others_keep_theirs(
    similarity: str, times: float, held: bool
):
    signals = 1e-30 * units(rows(5, 6))
    signals[2] *= times
    aggregator = ga.EqualAgreement(similarity=similarity)
    found, expected = (aggregator.aggregate(each) for each in (signals.float(), signals))
    assert (found.weights[2] == 0) == (not held)
    others = [0, 1, 3, 4]
    assert_close(found.weights[others].double(), expected.weights[others], rtol=1e-5, atol=0)
    if held:
        error = (found.update.double() - expected.update).norm()
        assert error <= 1e-5 * expected.update.norm()


def test_weights_that_the_dtype_cannot_hold_are_refused_in_one_sentence():
    signals = rows(4, 6).float() * torch.tensor([1e-30, 1e-30, 1e30, 1e30])[:, None]
    with pytest.raises(ValueError, match=r"expected a finite update, found .* float64 signals"):
        ga.EqualAgreement()(signals)
    assert ga.EqualAgreement()(signals.double()).isfinite().all()


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("damping", [1e-30, 1e-12])
def test_a_damping_that_float32_cannot_hold_is_named_and_float64_holds_more(
    similarity: str, damping: float
):
    """Six dependent tasks: without damping d is the least squares solution of u_i · d = 1."""
    signals = rows(6, 2)
    with pytest.raises(ValueError, match=r"expected a finite update, found .* a small damping"):
        ga.EqualAgreement(damping=damping, similarity=similarity)(signals.float())
    scaled = units(signals) if similarity == "cosine" else signals / median_norm(signals)
    solution = np.linalg.lstsq(scaled.numpy(), np.ones(6))[0]
    expected = median_norm(signals) * torch.from_numpy(solution)
    update = ga.EqualAgreement(damping=1e-12, similarity=similarity)(signals)
    assert_close(update, expected, rtol=1e-3, atol=0)
