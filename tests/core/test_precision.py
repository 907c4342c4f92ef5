"""Numbers that a careless sum would lose: extreme scales, half precision, many terms."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import gradagree_opt as ga
from gradagree_opt.core.combination import combine
from gradagree_opt.core.stacks import tree_norm
from gradagree_testing import reference
from gradagree_testing.reference import exact


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def expected_weights(matrix: Tensor) -> Tensor:
    return torch.tensor(reference.agreement(reference.gram(exact(matrix))).astype(float)).float()


@pytest.mark.parametrize("exponent", range(-30, 31, 5))
@pytest.mark.parametrize("similarity", ["inner", "cosine"])
def test_a_power_of_two_near_any_power_of_ten_leaves_the_weights_as_they_are(
    exponent: int, similarity: str
):
    matrix = rows(6, 40)
    scale = 2.0 ** round(exponent * 3.321928)
    aggregator = ga.GradientAgreement(similarity=similarity)
    result, scaled = aggregator.aggregate(matrix), aggregator.aggregate(matrix * scale)
    assert_close(scaled.weights, result.weights, rtol=1e-6, atol=1e-7)
    assert_close(scaled.update, result.update * scale, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("exponent", range(-36, 37, 3))
def test_weights_at_every_scale_are_those_of_exact_arithmetic(exponent: int):
    matrix = rows(6, 9) * 10.0**exponent
    assert_close(ga.agreement_weights(matrix), expected_weights(matrix), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("similarity", ["inner", "cosine"])
def test_tasks_sixty_decades_apart_are_weighted_as_in_exact_arithmetic(similarity: str):
    matrix = rows(4, 10) * torch.tensor([1e-30, 1e30, 1e30, 1.0])[:, None]
    gram = reference.gram(exact(matrix))
    expected = reference.agreement(gram, similarity=similarity).astype(float)
    weights = ga.agreement_weights(matrix, similarity=similarity)
    assert_close(weights, torch.tensor(expected).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_stacks_have_the_precision_of_float32(dtype: torch.dtype):
    matrix = (0.1 + rows(8, 3000)).to(dtype)
    weights = ga.agreement_weights(matrix)
    assert weights.dtype == torch.float32
    expected = reference.agreement(reference.gram(matrix.double().numpy()))
    assert_close(weights, torch.tensor(expected).float(), rtol=1e-5, atol=1e-6)


def test_squares_that_overflow_or_vanish_in_float16_are_summed():
    for scale in (60_000.0, 1e-7):
        matrix = (torch.tensor([[1.0, 0.5], [1.0, -0.5], [-0.5, 0.0]]) * scale).half()
        assert_close(ga.agreement_weights(matrix), expected_weights(matrix))


def test_the_weighted_sum_of_a_half_precision_stack_is_accumulated_in_float32():
    """1000 terms of 1 after one of 2048: float16 would stay at 2048, bfloat16 at 256."""
    stack = torch.cat([torch.full((1, 1), 2048.0), torch.ones(1000, 1)])
    assert combine(stack.half(), torch.ones(1001)).item() == 3048
    stack[0] = 256
    assert combine(stack.bfloat16(), torch.ones(1001)).item() == torch.tensor(1256.0).bfloat16()


def test_many_parameters_keep_the_precision_of_their_sums():
    matrix = 1 + 0.01 * rows(3, 1_000_000)
    gram = reference.gram(matrix.double().numpy())
    expected = torch.tensor(reference.agreement(gram)).float()
    result = ga.GradientAgreement().aggregate(matrix)
    assert_close(result.weights, expected, rtol=1e-5, atol=0)
    scores = torch.tensor(reference.scores(gram)).float()
    assert_close(result.scores, scores, rtol=1e-5, atol=0)


def test_nearly_cancelling_signals_keep_the_precision_that_their_entries_have():
    matrix = rows(2, 50)
    matrix[1] = -matrix[0] + 1e-2 * matrix[1]
    weights = ga.agreement_weights(matrix)
    assert_close(weights, expected_weights(matrix), rtol=0, atol=1e-4)


def test_float64_is_kept_throughout():
    matrix = rows(6, 30).double() + 1e-9 * rows(6, 30, seed=1).double()
    result = ga.GradientAgreement().aggregate(matrix)
    expected = reference.agreement(reference.gram(exact(matrix))).astype(float)
    assert result.update.dtype == result.weights.dtype == result.scores.dtype == torch.float64
    assert_close(result.weights, torch.tensor(expected), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1.0, 1e30, 1e37])
def test_norms_neither_overflow_nor_vanish(scale: float):
    tree = {"a": rows(3, 4) * scale, "b": [rows(1, 2)[0, 0] * scale], "c": torch.zeros(0)}
    expected = torch.cat([tree["a"].flatten(), tree["b"][0][None]]).double().norm()
    assert_close(tree_norm(tree).double(), expected, rtol=1e-6, atol=1e-44)


def test_the_default_dtype_has_no_say():
    matrix = rows(4, 6)
    expected = ga.GradientAgreement().aggregate(matrix)
    torch.set_default_dtype(torch.float64)
    try:
        result = ga.GradientAgreement().aggregate(matrix)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(result[:3], expected[:3])
    assert_close(tuple(result.diagnostics), tuple(expected.diagnostics), equal_nan=True)
