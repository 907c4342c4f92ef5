"""What is claimed of Equal Agreement, each claim against something computed another way."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

import gradagree_opt as ga
from gradagree_testing.reference import Array, exact
from gradagree_testing.strategies import matrices, tensor

from .conftest import SIMILARITIES, median_norm, rows, units

DAMPINGS = (1e-3, 0.01, 1.0)


# The formulas, in exact arithmetic. Rows with whole norms have cosines that are fractions.

WHOLE_NORMS = ([3, 4], [-4, 3], [5, 12], [12, -5], [-8, -15], [20, 21], [0, 7], [0, 0], [2, 0])


def solved(matrix: Array, vector: Array) -> Array:
    """matrix⁻¹ vector by Gauss and Jordan, in Fractions; the matrix is positive definite."""
    table = np.concatenate([matrix, vector[:, None]], 1)
    for column in range(len(vector)):
        table[column] = table[column] / table[column, column]
        for row in range(len(vector)):
            if row != column:
                table[row] = table[row] - table[row, column] * table[column]
    return table[:, -1]


def exact_weights(matrix: Array, damping: Fraction, similarity: str) -> Array:
    """The weights by their formula, in Fractions, of rows whose norms are whole numbers."""
    norms = np.array([Fraction(math.isqrt(int(row @ row))) for row in matrix])
    there = [index for index, norm in enumerate(norms) if norm]
    n = len(there)
    ascending = sorted(norms[there])
    tau = (ascending[(n - 1) // 2] + ascending[n // 2]) / 2
    units = exact(matrix)[there] / (norms[there, None] if similarity == "cosine" else tau)
    damped = units @ units.T / n + damping * exact(np.eye(n))
    scores = (1 + damping) * solved(damped, exact(np.ones(n)) / n)
    weights = exact(np.zeros(len(matrix)))
    weights[there] = scores * tau / norms[there] if similarity == "cosine" else scores
    return weights


@given(
    st.lists(st.sampled_from(WHOLE_NORMS), min_size=1, max_size=6),
    st.fractions(Fraction(1, 1000), 10),
    st.sampled_from(SIMILARITIES),
)
def test_weights_are_those_of_exact_arithmetic(
    chosen: list[list[int]], damping: Fraction, similarity: str
):
    matrix = np.array(chosen)
    assume(matrix.any())
    expected = exact_weights(matrix, damping, similarity).astype(float)
    aggregator = ga.EqualAgreement(damping=float(damping), similarity=similarity)
    weights = aggregator.aggregate(torch.from_numpy(matrix).double()).weights
    assert_close(weights, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_update_is_the_minimum_of_its_objective(similarity: str, damping: float):
    """Of Σ (u_i · d − 1)² + n λ ‖d‖², up to (1 + λ) τ; u_i in units of τ for "inner"."""
    signals = rows(5, 8)
    tau = median_norm(signals)
    scaled = units(signals) if similarity == "cosine" else signals / tau
    update = ga.EqualAgreement(damping=damping, similarity=similarity)(signals)
    d = (update / (1 + damping) / tau).requires_grad_()
    objective = ((scaled @ d - 1) ** 2).sum() + 5 * damping * d.square().sum()
    (slope,) = torch.autograd.grad(objective, d)
    assert slope.abs().max() < 1e-11


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_weights_and_covariance_give_one_direction(damping: float, shape: tuple[int, int]):
    """(Ĝ/n + λ I)⁻¹ as weights, and (Σ + λ I)⁻¹ ū with the covariance Σ of the u_i."""
    signals = rows(*shape)
    mean = units(signals).mean(0)
    covariance = torch.from_numpy(np.cov(units(signals).numpy().T, bias=True))
    expected = torch.linalg.solve(covariance + damping * torch.eye(shape[1]).double(), mean)
    update = ga.EqualAgreement(damping=damping)(signals)
    assert_close(update / update.norm(), expected / expected.norm(), rtol=1e-9, atol=1e-11)


# Scaling: one task, equal tasks, the limits of damping.


@given(matrices(max_tasks=1))
def test_one_task_has_weight_one(matrix: Array):
    assume(matrix.any())
    for similarity in SIMILARITIES:
        result = ga.EqualAgreement(similarity=similarity).aggregate(tensor(matrix))
        assert_close(result.weights, torch.ones(1).double())


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("n", [2, 7, 100])
def test_equal_tasks_give_the_mean(similarity: str, damping: float, n: int):
    signals = rows(1, 6).repeat(n, 1)
    result = ga.EqualAgreement(similarity=similarity, damping=damping).aggregate(signals)
    assert_close(result.update, signals[0])
    assert_close(result.weights, torch.full((n,), 1 / n).double())


def test_large_damping_gives_the_mean_of_equal_norms_and_of_inner_products_the_mean():
    signals = rows(6, 9)
    equalized = median_norm(signals) * units(signals).mean(0)
    assert_close(ga.EqualAgreement(damping=1e9)(signals), equalized, rtol=1e-7, atol=1e-8)
    inner = ga.EqualAgreement(damping=1e9, similarity="inner")(signals)
    assert_close(inner, signals.mean(0), rtol=1e-7, atol=1e-8)


def test_small_damping_lets_independent_tasks_agree_exactly_alike():
    signals = rows(6, 9)
    result = ga.EqualAgreement(damping=1e-12).aggregate(signals)
    products = units(signals) @ result.update
    assert_close(products, products.mean().expand(6), rtol=1e-8, atol=0)
    assert result.diagnostics.agreement_spread < 1e-8


def test_undamped_it_has_the_line_of_imtl_g_whose_step_may_oppose_every_task():
    """Liu et al. 2021: weights G⁻¹ ‖g_i‖ over their sum, which is negative here."""
    signals = torch.tensor([[1.0, 0.3, 0.0], [1.0, -0.3, 0.0], [0.1, 0.0, 0.005]]).double()
    weights = torch.linalg.solve(signals @ signals.T, signals.norm(dim=1))
    imtl_g = weights / weights.sum() @ signals
    update = ga.EqualAgreement(damping=1e-10)(signals)
    assert_close(imtl_g / imtl_g.norm(), -update / update.norm(), rtol=1e-5, atol=1e-5)
    assert (units(signals) @ imtl_g < 0).all() and (units(signals) @ update > 0).all()


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("n", [2, 10, 100])
def test_for_orthogonal_tasks_the_step_is_as_many_times_the_means_as_is_said(
    n: int, damping: float
):
    signals = 3 * torch.eye(n).double()
    ratio = ga.EqualAgreement(damping=damping)(signals).norm() / signals.mean(0).norm()
    assert_close(ratio.item(), n * (1 + damping) / (1 + n * damping))


@pytest.mark.parametrize("damping", DAMPINGS)
@given(matrices())
def test_scores_are_bounded_by_the_damping(damping: float, matrix: Array):
    scores = ga.EqualAgreement(damping=damping).aggregate(tensor(matrix)).scores
    n = max(1, np.any(matrix != 0, axis=1).sum())
    assert scores.square().sum() <= (1 + damping) ** 2 / (n * damping**2) * (1 + 1e-9)


@pytest.mark.parametrize("damping", [1e-3, 0.01, 0.1])
@given(matrices())
def test_the_update_is_never_longer_than_the_damping_allows(damping: float, matrix: Array):
    """τ (1 + λ) / (2 √λ); two units whose mean has length √λ reach it."""
    bound = (1 + damping) / (2 * math.sqrt(damping))
    signals = tensor(matrix)
    assume(matrix.any())
    for similarity in SIMILARITIES:
        aggregator = ga.EqualAgreement(damping=damping, similarity=similarity)
        assert aggregator(signals).norm() <= bound * median_norm(signals) * (1 + 1e-9)
        half, across = math.sqrt(damping), math.sqrt(1 - damping)
        longest = aggregator(torch.tensor([[half, across], [half, -across]]).double())
        assert_close(longest.norm().item(), bound, rtol=1e-6, atol=0)


# Directions: descent, and continuity where the tasks cancel.


@given(matrices(), st.sampled_from(DAMPINGS))
def test_the_update_never_opposes_the_mean_of_what_is_made_equal(matrix: Array, damping: float):
    signals = tensor(matrix)
    there = signals[signals.norm(dim=1) > 0]
    assume(len(there))
    for similarity, means in (("cosine", units(there)), ("inner", there / median_norm(there))):
        update = ga.EqualAgreement(similarity=similarity, damping=damping)(signals)
        assert update @ means.mean(0) >= -1e-9 * update.norm() * means.mean(0).norm() - 1e-12


def test_the_update_goes_to_zero_continuously_with_the_sum_of_the_units():
    """Two tasks at an angle just below π."""
    for angle in (1e-1, 1e-2, 1e-3, 1e-4):
        directions = [[1.0, 0.0], [-math.cos(angle), math.sin(angle)]]
        signals = torch.tensor(directions, dtype=torch.float64)
        update = ga.EqualAgreement()(signals)
        # Along (u_1 + u_2)/2, of length sin(angle/2), which is (1 + λ)/(sin² + λ) times as long.
        half = math.sin(angle / 2)
        assert_close(update.norm().item(), 1.01 / (half**2 + 0.01) * half, rtol=1e-9, atol=0)
    assert ga.EqualAgreement()(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).norm() < 1e-6


# Invariances.


@given(matrices(), st.randoms(use_true_random=False))
def test_weights_follow_the_order_of_the_tasks(matrix: Array, random):
    order = list(range(len(matrix)))
    random.shuffle(order)
    for similarity in SIMILARITIES:
        aggregator = ga.EqualAgreement(similarity=similarity)
        weights = aggregator.aggregate(tensor(matrix)).weights
        moved = aggregator.aggregate(tensor(matrix)[order]).weights
        assert_close(moved, weights[order], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_weights_are_invariant_to_rotations_and_a_common_scale(similarity: str):
    aggregator, signals = ga.EqualAgreement(similarity=similarity), rows(6, 9)
    expected = aggregator.aggregate(signals).weights
    rotation, _ = torch.linalg.qr(rows(9, 9, seed=1))
    assert_close(aggregator.aggregate(signals @ rotation).weights, expected)
    assert_close(aggregator.aggregate(1e9 * signals).weights, expected)


def test_the_cosine_sees_the_scale_of_a_task_through_the_median_alone():
    signals = rows(5, 7)
    result = ga.EqualAgreement().aggregate(signals)
    largest = signals.norm(dim=1).argmax()
    scaled = signals.clone()
    scaled[largest] *= 1e6  # the median stays
    again = ga.EqualAgreement().aggregate(scaled)
    assert_close(again.update, result.update)
    assert_close(again.scores, result.scores)
    assert_close(again.weights[largest], result.weights[largest] / 1e6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e20, 1e30])
def test_one_huge_task_moves_nothing(dtype: torch.dtype, size: float):
    signals = rows(5, 7).to(dtype)
    huge = signals.clone()
    huge[0] *= size
    for scale in (1e-30, 1.0):
        update = ga.EqualAgreement()(huge * scale) if scale * size < 1e31 else None
        expected = ga.EqualAgreement()(
            torch.cat([10 * units(signals[:1].float()).to(dtype), signals[1:]]) * scale
        )
        tolerance = 2e-5 if dtype == torch.float32 else 0.03
        assert (update - expected).float().norm() <= tolerance * expected.float().norm()


def test_a_task_of_zeros_is_left_out():
    signals = rows(6, 9)
    expected = ga.EqualAgreement().aggregate(signals[[0, 2, 3, 5]])
    for similarity in SIMILARITIES:
        aggregator = ga.EqualAgreement(similarity=similarity)
        expected = aggregator.aggregate(signals[[0, 2, 3, 5]])
        signals[[1, 4]] = 0
        result = aggregator.aggregate(signals)
        assert_close(result.update, expected.update)
        assert result.weights[[1, 4]].tolist() == [0.0, 0.0]
        assert not result.diagnostics.degenerate


@pytest.mark.parametrize("nonfinite", ["raise", "drop", "propagate"])
def test_tasks_of_zeros_alone_give_no_step_and_the_degenerate_flag(nonfinite: str):
    for aggregator in (ga.EqualAgreement(nonfinite=nonfinite), ga.GramianPower(-0.5)):
        result = aggregator.aggregate(torch.zeros(4, 3))
        assert result.update.tolist() == [0.0, 0.0, 0.0]
        assert result.diagnostics.degenerate
        assert result.diagnostics.smallest_agreement.isnan()
