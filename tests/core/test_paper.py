"""The eight points that are known of the method, each as a test of the library."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import gradagree_opt as ga
from gradagree_testing import reference
from gradagree_testing.reference import Array, exact
from gradagree_testing.strategies import INTEGERS, matrices, tensor

paper = ga.GradientAgreement()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_signals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def exact_scores(matrix: Array) -> Array:
    return reference.scores(reference.gram(exact(matrix)))


# 1. A first-order descent direction for the mean, never shorter than the mean step.


@given(matrices())
def test_the_update_times_the_mean_is_the_sum_of_squared_scores_over_n_times_the_sum_of_scores(
    matrix: Array,
):
    scores = exact_scores(matrix)
    assume(scores.any())
    expected = Fraction((scores**2).sum(), len(matrix) * abs(scores).sum())
    signals = tensor(matrix)
    assert_close(float(paper(signals) @ signals.mean(0)), float(expected))


@given(matrices())
def test_a_step_along_the_update_descends_the_mean_at_least_as_fast_as_the_mean_step(
    matrix: Array,
):
    signals = tensor(matrix)
    mean = signals.mean(0)
    assert paper(signals) @ mean >= (mean @ mean) * (1 - 1e-12)


@given(matrices())
def test_the_update_is_never_shorter_than_the_mean(matrix: Array):
    result = paper.aggregate(tensor(matrix))
    assert result.update.norm() >= tensor(matrix).mean(0).norm() * (1 - 1e-12)
    if not result.diagnostics.degenerate:
        assert result.diagnostics.update_to_mean >= 1 - 1e-12


# 2. Σ|w_i| = 1 and Σ w_i = ‖Σ g_i‖² / Σ|s_i|; equal signals give the mean.


@given(matrices())
def test_absolute_weights_add_to_one(matrix: Array):
    weights = paper.aggregate(tensor(matrix)).weights
    assert_close(weights.abs().sum().item(), 1.0)


@given(matrices())
def test_weights_add_to_the_squared_norm_of_the_sum_over_the_sum_of_absolute_scores(
    matrix: Array,
):
    total = exact(matrix).sum(0)
    scores = exact_scores(matrix)
    assume(scores.any())
    expected = float((total @ total) / abs(scores).sum())
    weights = paper.aggregate(tensor(matrix)).weights
    assert_close(weights.sum().item(), expected, rtol=1e-12, atol=1e-12)
    assert -1e-12 <= weights.sum() <= 1 + 1e-12


@given(st.lists(INTEGERS, min_size=1, max_size=5), st.integers(1, 7))
def test_equal_signals_give_exactly_the_mean(signal: list[int], n: int):
    signals = tensor(np.array([signal] * n, dtype=object))
    result = paper.aggregate(signals)
    assert_close(result.weights, torch.full((n,), 1 / n, dtype=torch.float64), rtol=1e-15, atol=0)
    assert_close(result.update, signals[0], rtol=1e-15, atol=0)


@given(matrices())
def test_against_a_summing_baseline_the_outer_rate_differs_by_n(matrix: Array):
    signals = tensor(matrix)
    assert_close(ga.Sum()(signals), len(matrix) * ga.Mean()(signals))
    equal = signals[:1].expand_as(signals)
    assert_close(ga.Sum()(equal), len(matrix) * paper(equal))


# 3. Invariances.


@given(matrices(), st.integers(-60, 60))
def test_weights_are_invariant_to_one_positive_scale_shared_by_all_tasks(
    matrix: Array, exponent: int
):
    signals = tensor(matrix)
    weights = paper.aggregate(signals).weights
    assert paper.aggregate(signals * 2.0**exponent).weights.equal(weights)
    assert_close(paper.aggregate(signals * math.pi).weights, weights)
    assert_close(paper.aggregate(signals * -math.pi).weights, weights)


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_invariant_to_rotations_and_the_update_rotates_along(seed: int):
    signals = random_signals(6, 8, seed=seed)
    rotation = torch.linalg.qr(random_signals(8, 8, seed=100 + seed)).Q
    result, rotated = paper.aggregate(signals), paper.aggregate(signals @ rotation)
    assert_close(rotated.weights, result.weights)
    assert_close(rotated.update, result.update @ rotation)


@given(matrices(), st.randoms(use_true_random=False))
def test_weights_follow_the_order_of_the_tasks_and_the_update_does_not(matrix: Array, random):
    order = list(range(len(matrix)))
    random.shuffle(order)
    signals = tensor(matrix)
    result, permuted = paper.aggregate(signals), paper.aggregate(signals[order])
    assert_close(permuted.weights, result.weights[order])
    assert_close(permuted.update, result.update)


def test_weights_are_not_invariant_to_a_scale_per_task():
    signals = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert_close(paper.aggregate(signals).weights, torch.tensor([0.5, 0.5]))
    signals[1] *= 3
    assert_close(paper.aggregate(signals).weights, torch.tensor([0.1, 0.9]))


@given(st.lists(INTEGERS, min_size=1, max_size=5))
def test_one_task_has_weight_one(signal: list[int]):
    signals = tensor(np.array([signal], dtype=object))
    result = paper.aggregate(signals)
    assert_close(result.weights.item(), 1.0)
    assert_close(result.update, signals[0])


# 4. Norm dominance.


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_orthogonal_tasks_are_weighted_by_their_squared_norms(lengths: list[int]):
    signals = torch.diag(torch.tensor(lengths, dtype=torch.float64))
    total = sum(length**2 for length in lengths)
    expected = torch.tensor([length**2 / total for length in lengths], dtype=torch.float64)
    assert_close(paper.aggregate(signals).weights, expected)
    assert_close(ga.NormShare().aggregate(signals).weights, expected)


def test_in_many_dimensions_the_large_task_wins_whatever_it_agrees_with():
    signals = random_signals(5, 100_000) * torch.tensor([[1.0], [1.0], [1.0], [1.0], [10.0]])
    signals[:4] += 0.1 * random_signals(1, 100_000, seed=1)  # four agree, and the fifth does not
    weights = paper.aggregate(signals).weights
    assert_close(weights, ga.NormShare().aggregate(signals).weights, rtol=0, atol=0.02)
    assert weights[4] > 0.9


# 5. An outlier against four.


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 3.0, 3.75, 4.25, 5.0, 8.0, 100.0])
def test_an_outlier_is_outvoted_by_four_equal_tasks_only_while_it_is_less_than_four_times_as_large(
    ratio: float,
):
    signals = torch.tensor([1.0, 1.0, 1.0, 1.0, -ratio])[:, None] * torch.tensor([3.0, 4.0])
    result = paper.aggregate(signals)
    assert bool(result.weights[4] < 0) == (ratio < 4)
    assert bool((result.weights[:4] < 0).all()) == (ratio > 4)
    assert bool(result.update @ torch.tensor([3.0, 4.0]) > 0) == (ratio < 4)


def test_an_outlier_exactly_four_times_as_large_as_each_of_four_gives_the_fallback():
    result = paper.aggregate(torch.tensor([[1.0], [1.0], [1.0], [1.0], [-4.0]]))
    assert result.diagnostics.degenerate
    assert_close(result.weights, torch.full((5,), 0.2))


# 6. Negative weights.


@given(matrices(min_tasks=2))
def test_a_weight_is_negative_exactly_where_the_other_tasks_outweigh_the_own_squared_norm(
    matrix: Array,
):
    assume(matrix.sum(0).any())
    gram = reference.gram(exact(matrix))
    own = np.diag(gram)
    others = gram.sum(1) - own
    assume((others != -own).all())  # the sign of a zero weight is rounding
    assert (paper.aggregate(tensor(matrix)).weights < 0).tolist() == (others < -own).tolist()


def test_a_step_along_a_task_with_negative_weight_ascends_its_loss():
    signals = torch.tensor([[1.0, 1.0], [1.0, -0.5], [1.0, 0.0], [-0.5, 0.2]])
    result = paper.aggregate(signals)
    outvoted = result.weights < 0
    assert outvoted.tolist() == [False, False, False, True]
    descent = signals @ result.update
    assert (descent[~outvoted] > 0).all()
    assert (descent[outvoted] < 0).all()


# 7. Signals that cancel.


@given(matrices())
def test_scores_cancel_exactly_where_the_signals_add_to_zero(matrix: Array):
    result = paper.aggregate(tensor(matrix))
    assert bool(result.diagnostics.degenerate) == (not matrix.sum(0).any())


@given(matrices(min_tasks=1, max_tasks=4))
def test_signals_that_add_to_zero_give_uniform_weights_and_no_step(matrix: Array):
    balanced = tensor(np.vstack([matrix, -matrix.sum(0, keepdims=True)]))
    result = paper.aggregate(balanced)
    n = len(balanced)
    assert result.diagnostics.degenerate
    assert_close(result.weights, torch.full((n,), 1 / n, dtype=torch.float64))
    assert result.update.abs().max() < 1e-14


def test_the_update_does_not_vanish_as_the_signals_cancel():
    for exponent in range(1, 6):
        almost = torch.tensor([[1.0, 0.0], [-1.0 + 10.0**-exponent, 0.0]], dtype=torch.float64)
        result = paper.aggregate(almost)
        assert not result.diagnostics.degenerate
        assert_close(result.update, almost.new_tensor([1.0, 0.0]), rtol=0, atol=10.0**-exponent)


def test_the_weights_are_discontinuous_where_the_signals_cancel():
    step = torch.tensor([[1e-3], [0.0]], dtype=torch.float64)
    opposite = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert_close(paper.aggregate(opposite + step).weights[0].item(), 0.5, atol=1e-3, rtol=0)
    assert_close(paper.aggregate(opposite + step).weights[1].item(), -0.5, atol=1e-3, rtol=0)
    assert_close(paper.aggregate(opposite).weights.tolist(), [0.5, 0.5])


# 8. The MAML form has no such guarantees.


def test_weights_measured_on_other_vectors_can_give_an_ascent_direction():
    directions = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.5, 0.0]])
    displacements = torch.tensor([[1.0], [1.0], [-3.0]])
    update = paper.aggregate(directions, signal=displacements).update
    assert update @ directions.mean(0) < 0


def test_weights_measured_on_other_vectors_can_give_a_step_shorter_than_the_mean():
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.5, 0.0]])
    displacements = torch.tensor([[1.0], [1.0], [-1.0]])
    update = paper.aggregate(directions, signal=displacements).update
    assert 0 < update.norm() < directions.mean(0).norm()
