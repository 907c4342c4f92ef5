"""What holds for every aggregator on every kind of matrix, at every scale and in every dtype."""

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt import Aggregation
from gradagree_testing import reference
from gradagree_testing.configurations import CONFIGURATIONS, Configuration
from gradagree_testing.looping import every
from gradagree_testing.samplers import SAMPLERS, Sampler

NUMBERS = (
    (torch.float64, 1.0),
    (torch.float64, 1e120),
    (torch.float32, 1.0),
    (torch.float32, 1e30),
    (torch.float32, 1e-30),
    (torch.bfloat16, 1.0),
    (torch.bfloat16, 1e-30),
    (torch.float16, 1.0),
)


class Case(NamedTuple):
    """A matrix, and its Gram matrix in exact arithmetic (float64 where that takes too long)."""

    matrix: Tensor
    gram: reference.Array


@cache
def case(sampler: Sampler, dtype: torch.dtype, scale: float) -> Case:
    matrix = (sampler(torch.Generator().manual_seed(1)) * scale).to(dtype)
    wide = matrix.double().numpy()
    gram = reference.gram(reference.exact(matrix) if len(matrix) < 100 else wide)
    return Case(matrix, gram)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@every(sampler=SAMPLERS, numbers=NUMBERS)
def test_every_aggregator_combines_rows_with_the_weights_of_the_reference(
    configuration: Configuration, sampler: Sampler, numbers: tuple[torch.dtype, float]
):
    assert_contract(configuration, case(sampler, *numbers))


def assert_contract(configuration: Configuration, case: Case, device: str = "cpu") -> None:
    matrix, gram = case
    result = configuration.make().aggregate(matrix.to(device))
    result = tree_map(lambda tensor: tensor.cpu(), result)
    assert_expected_structure(result, matrix)
    assert_linear_combination_of_rows(result, matrix)
    if configuration.weights is not None:
        expected = configuration.weights(gram).astype(float)
        rounding = weight_rounding(configuration, gram, expected, matrix.dtype)
        size = max(1.0, abs(expected).max())  # a matched norm can make weights larger than 1
        assert (rounding < 0.02 * size).all(), "too ill-conditioned to tell right from wrong"
        assert (abs(result.weights.double().numpy() - expected) <= rounding).all()
    assert_scores(result, configuration, gram)


def assert_expected_structure(result: Aggregation, matrix: Tensor) -> None:
    assert result.update.shape == matrix.shape[1:]
    assert result.update.dtype == matrix.dtype
    assert result.update.isfinite().all()
    for values in (result.weights, result.scores):
        assert values.shape == matrix.shape[:1]
        assert values.dtype == torch.promote_types(matrix.dtype, torch.float32)
    assert result.weights.isfinite().all()


def assert_linear_combination_of_rows(result: Aggregation, matrix: Tensor) -> None:
    """update = Σ w_i g_i, up to one rounding to the matrix' dtype and those of the sum."""
    weights, rows = result.weights.double(), matrix.double()
    number = torch.finfo(matrix.dtype)
    eps = torch.finfo(result.weights.dtype).eps
    error = (result.update.double() - weights @ rows).abs()
    sums = (8 + len(rows) ** 0.5) * eps * (weights.abs() @ rows.abs())
    allowed = (weights @ rows).abs() * number.eps + sums + number.smallest_normal
    assert (error <= allowed).all()


def assert_scores(result: Aggregation, configuration: Configuration, gram: reference.Array) -> None:
    """The scores are the row sums s_i; beyond the range of their dtype 0 or ±inf, never NaN."""
    expected, rounding = scores_and_rounding(configuration, gram, result.scores.dtype)
    dtype = result.scores.dtype
    slack = rounding + torch.finfo(dtype).smallest_normal
    assert (result.scores >= torch.tensor(expected - slack).to(dtype)).all()
    assert (result.scores <= torch.tensor(expected + slack).to(dtype)).all()


def weight_rounding(
    configuration: Configuration,
    gram: reference.Array,
    weights: reference.Array,
    dtype: torch.dtype,
) -> reference.Array:
    """What rounding can do to each weight, by the rounding of the scores that it comes from."""
    wide = torch.promote_types(dtype, torch.float32)
    if configuration.rounding is not None:
        rounding = torch.finfo(wide).eps * configuration.rounding(gram)[0]
        return rounding + torch.finfo(dtype).eps * abs(weights) * configuration.amplifies
    scores, rounding = scores_and_rounding(configuration, gram, wide)
    own = 16 * torch.finfo(wide).eps * abs(weights)
    total = abs(scores).sum()
    if total <= 1e-12 * signal_lengths(configuration, gram).sum() ** 2:
        return own
    if configuration.options.get("normalization") == "softmax":
        sharpness = len(gram) / configuration.options.get("temperature", 1.0)
        return own + 2 * sharpness * weights * rounding.sum() / total
    if configuration.amplifies:
        condition = signal_lengths(configuration, gram).sum() ** 2 / total
        # The factor is the ratio of two lengths of updates, each rounded to the dtype.
        return own + condition * rounding.sum() / total + torch.finfo(dtype).eps * abs(weights)
    return own + (rounding + abs(weights) * rounding.sum()) / total


def scores_and_rounding(
    configuration: Configuration, gram: reference.Array, dtype: torch.dtype
) -> tuple[reference.Array, reference.Array]:
    """The scores, and what rounding can do to each: a few eps · ‖g_i‖ Σ_j ‖g_j‖."""
    if configuration.scores is not None:
        eps = torch.finfo(dtype).eps
        return configuration.scores(gram), eps * configuration.rounding(gram)[1]
    options = configuration.options
    similarity, include_self = options.get("similarity", "inner"), options.get("include_self", True)
    scores = reference.scores(gram, similarity=similarity, include_self=include_self).astype(float)
    lengths = signal_lengths(configuration, gram)
    rounding = 16 * torch.finfo(dtype).eps * lengths * lengths.sum()
    if options.get("negative") != "clip":
        return scores, rounding
    return np.maximum(scores, 0), np.where(scores < -rounding, 0, rounding)


def signal_lengths(configuration: Configuration, gram: reference.Array) -> reference.Array:
    """‖g_i‖, of the unit vectors where the similarity is the cosine."""
    lengths = np.sqrt(np.diag(gram).astype(float))
    unit = configuration.options.get("similarity") == "cosine"
    return (lengths > 0).astype(float) if unit else lengths
