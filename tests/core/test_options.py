"""Every option of GradientAgreement, alone and together, against exact arithmetic."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import gradagree_opt as ga
from gradagree_testing import configurations, reference
from gradagree_testing.reference import Array, exact
from gradagree_testing.strategies import matrices, tensor

AXES = configurations.AXES | {"degenerate": ("uniform", "zero")}
COMBINATIONS = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]


@given(matrices(), st.sampled_from(COMBINATIONS), st.sampled_from([0.25, 1.0, 3.0]))
def test_weights_scores_and_update_are_those_of_exact_arithmetic(
    matrix: Array, options: dict[str, Any], temperature: float
):
    gram = reference.gram(exact(matrix))
    weights = reference.agreement(gram, temperature=temperature, **options).astype(float)
    scores = reference.scores(
        gram, similarity=options["similarity"], include_self=options["include_self"]
    )
    if options["negative"] == "clip":
        scores = np.maximum(scores, 0)
    result = ga.GradientAgreement(temperature=temperature, **options).aggregate(tensor(matrix))
    np.testing.assert_allclose(result.weights, weights, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(result.scores, scores.astype(float), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(result.update, weights @ matrix.astype(float), rtol=1e-9, atol=1e-9)


@given(matrices(), st.sampled_from(COMBINATIONS))
def test_agreement_weights_are_the_weights_of_the_aggregator(
    matrix: Array, options: dict[str, Any]
):
    signals = tensor(matrix)
    weights = ga.GradientAgreement(**options).aggregate(signals).weights
    assert ga.agreement_weights(signals, **options).equal(weights)


SIGNALS = torch.tensor([[4.0, 0.0], [3.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
"""Scores by hand: Σ g = (6, 3), so s = (24, 21, 6, −6); without themselves (8, 11, 2, −7)."""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [24 / 57, 21 / 57, 6 / 57, -6 / 57]),
        ({"include_self": False}, [8 / 28, 11 / 28, 2 / 28, -7 / 28]),
        ({"negative": "clip"}, [24 / 51, 21 / 51, 6 / 51, 0.0]),
        ({"include_self": False, "negative": "clip"}, [8 / 21, 11 / 21, 2 / 21, 0.0]),
    ],
)
def test_a_worked_example_gives_the_weights_found_by_hand(
    options: dict[str, Any], expected: list[float]
):
    weights = ga.GradientAgreement(**options).aggregate(SIGNALS).weights
    assert_close(weights, torch.tensor(expected))


def test_with_the_cosine_the_length_of_a_signal_says_nothing():
    lengths = torch.tensor([[1e-3], [1.0], [7.0], [1e4]])
    cosine = ga.GradientAgreement(similarity="cosine")
    weights = cosine.aggregate(SIGNALS).weights
    assert_close(cosine.aggregate(SIGNALS * lengths).weights, weights)
    unit = SIGNALS / SIGNALS.norm(dim=1, keepdim=True)
    assert_close(weights, ga.GradientAgreement().aggregate(unit).weights)


def test_with_the_cosine_a_zero_signal_has_score_and_weight_zero():
    signals = torch.cat([SIGNALS, torch.zeros(1, 2)])
    result = ga.GradientAgreement(similarity="cosine").aggregate(signals)
    assert result.weights[4] == 0
    assert result.scores[4] == 0
    assert_close(result.weights[:4], ga.agreement_weights(SIGNALS, similarity="cosine"))


def test_a_cold_softmax_gives_all_weight_to_the_best_task_and_a_hot_one_uniform_weights():
    def weights(temperature: float) -> torch.Tensor:
        return ga.agreement_weights(SIGNALS, normalization="softmax", temperature=temperature)

    assert_close(weights(1e-3), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert_close(weights(1e6), torch.full((4,), 0.25), rtol=0, atol=1e-5)


def test_the_softmax_has_no_scale():
    softmax = ga.GradientAgreement(normalization="softmax")
    assert_close(softmax.aggregate(SIGNALS * 1e20).weights, softmax.aggregate(SIGNALS).weights)


def test_one_task_without_itself_falls_back_to_weight_one():
    result = ga.GradientAgreement(include_self=False).aggregate(SIGNALS[:1])
    assert result.diagnostics.degenerate
    assert result.weights.tolist() == [1.0]
    assert_close(result.update, SIGNALS[0])


@pytest.mark.parametrize("times", [1e2, 1e4, 1e6, 1e8, 1e12])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_without_themselves_one_large_task_does_not_round_the_others_away(times: float, scope: str):
    matrix = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    matrix[3] *= times
    expected = reference.agreement(reference.gram(matrix.double().numpy()), include_self=False)
    result = ga.GradientAgreement(include_self=False, scope=scope).aggregate({"w": matrix})
    assert not result.diagnostics.degenerate
    np.testing.assert_allclose(result.weights.reshape(8), expected, rtol=0, atol=1e-6)


def test_with_the_cosine_a_small_task_counts_as_much_as_a_large_one():
    options = {"similarity": "cosine", "include_self": False}
    expected = ga.agreement_weights(SIGNALS, **options)
    lengths = torch.tensor([[1e30], [1e-30], [1.0], [1e-42]])
    assert_close(ga.agreement_weights(SIGNALS * lengths, **options), expected, rtol=1e-2, atol=0)
    lengths[3] = 1e-30
    assert_close(ga.agreement_weights(SIGNALS * lengths, **options), expected)


def test_clipping_where_no_task_agrees_falls_back():
    clipped = ga.GradientAgreement(include_self=False, negative="clip")
    result = clipped.aggregate(torch.tensor([[1.0, 0.0], [-1.0, 0.1]]))
    assert result.diagnostics.degenerate
    assert result.weights.tolist() == [0.5, 0.5]
