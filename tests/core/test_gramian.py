"""Statistics of signals that are known by their inner products alone."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import gradagree_opt as ga
from gradagree_opt.core.measuring import measure, measure_groups
from gradagree_opt.core.statistics import from_gramian
from gradagree_testing import reference
from gradagree_testing.configurations import AGREEMENTS, Configuration
from gradagree_testing.reference import exact
from gradagree_testing.samplers import SAMPLERS, Sampler

GRAMIAN = frozenset({"gramian"})
SCALES = [
    (torch.float32, 1e-15),
    (torch.float32, 1.0),
    (torch.float32, 1e15),
    (torch.float64, 1e100),
]


def signals(dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix[2] = 0
    return (matrix * scale).to(dtype)


def active(n: int = 6) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize(("dtype", "scale"), [*SCALES, (torch.float32, 1e30), (torch.bfloat16, 1)])
def test_the_measured_gramian_is_that_of_the_rows_in_units_of_their_scale(
    dtype: torch.dtype, scale: float
):
    matrix = signals(dtype, scale)
    statistics = measure([matrix[:, :4], matrix[:, 4:]], active(), GRAMIAN)
    scaling = statistics.scale.double()
    largest = matrix.double().abs().max()
    assert torch.frexp(scaling).mantissa == 0.5 and scaling <= largest < 2 * scaling
    rows = matrix.double() / scaling
    wide = torch.promote_types(dtype, torch.float32)
    assert_close(statistics.gramian, (rows @ rows.T).to(wide))
    assert measure([matrix], active()).gramian is None


def test_every_group_has_a_gramian():
    matrix = signals(torch.float64)
    groups = [[matrix[:, :4]], [matrix[:, 4:], matrix[:, :1]]]
    statistics = measure_groups(groups, active(), GRAMIAN)
    for index, leaves in enumerate(groups):
        alone = measure(leaves, active(), GRAMIAN)
        assert_close(statistics.gramian[index], alone.gramian)
    assert measure_groups(groups, active()).gramian is None


@pytest.mark.parametrize("configuration", AGREEMENTS, ids=str)
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_weights_from_a_gramian_are_those_from_its_signals(
    configuration: Configuration, dtype: torch.dtype, scale: float
):
    matrix = signals(dtype, scale)
    gram = matrix @ matrix.T
    decision = configuration.make().weighting(from_gramian(gram))
    expected = configuration.weights(reference.gram(exact(matrix))).astype(float)
    assert_close(decision.weights, torch.tensor(expected).to(dtype), rtol=1e-4, atol=1e-5)
    own = configuration.make().aggregate(matrix)
    assert_close(decision.scores, own.scores, rtol=1e-4, atol=float(gram.max()) * 1e-5)


def test_a_gramian_says_which_signals_are_not_finite():
    gram = signals(torch.float32) @ signals(torch.float32).T
    gram[1] = gram[:, 1] = torch.nan
    assert from_gramian(gram).finite.tolist() == [True, False, True, True, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signals_that_cancel_do_so_in_a_gramian_of_half_precision(dtype: torch.dtype):
    matrix = torch.randn(8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix - matrix.mean(0)
    gram = (matrix @ matrix.T).to(dtype)
    assert gram.float().sum(1).abs().sum() > 1e-4  # by rounding
    decision = ga.GradientAgreement(degenerate="zero").weighting(from_gramian(gram))
    assert decision.degenerate
    assert decision.weights.tolist() == [0.0] * 8


@pytest.mark.parametrize("similarity", ["inner", "cosine"])
def test_many_signals_that_do_not_cancel_keep_their_weights_in_half_precision(similarity: str):
    sizes = torch.arange(1.0, 257.0)  # exact in bfloat16, and all at right angles
    gram = torch.diag(sizes).bfloat16()
    weighting = ga.GradientAgreement(similarity=similarity, degenerate="raise").weighting
    decision = weighting(from_gramian(gram))
    expected = sizes / sizes.sum() if similarity == "inner" else torch.full((256,), 1 / 256)
    assert not decision.degenerate
    assert_close(decision.weights, expected)


def test_a_gramian_of_zeros_has_scale_one():
    statistics = from_gramian(torch.zeros(3, 3))
    assert statistics.scale == 1
    assert statistics.row_sums.tolist() == statistics.cosine_row_sums.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.__name__)
def test_gramian_tells_the_statistics_that_the_matrix_tells(sampler: Sampler):
    jacobian = sampler(torch.Generator().manual_seed(1))
    seen = []

    class Spy:
        needs = frozenset({"gramian", "cosine_row_sums"})

        def __call__(self, statistics):
            seen.append(statistics)
            return ga.Mean().weighting(statistics)

    ga.Aggregator(Spy()).aggregate({"a": jacobian[:, :1], "b": jacobian[:, 1:]})
    measured = seen[-1]  # the last where the first was of no use without scaling
    known = from_gramian(jacobian @ jacobian.T)
    for name in ("row_sums", "squared_norms", "gramian"):
        found = getattr(known, name) * known.scale**2
        expected = getattr(measured, name) * measured.scale**2
        size = measured.squared_norms.sum() * measured.scale**2
        assert (found - expected).abs().max() <= 1e-12 * size, name
    # The cosine of a small signal is as exact as the product of two signals of its size.
    cosines = known.cosine_row_sums - measured.cosine_row_sums
    assert cosines.abs().max() <= 1e-9 * len(jacobian)


def test_gramian_is_formed_for_those_alone_who_ask():
    seen = []

    class Spy:
        needs = frozenset()

        def __call__(self, statistics):
            seen.append(statistics.gramian)
            return ga.Mean().weighting(statistics)

    ga.Aggregator(Spy()).aggregate(signals(torch.float64))
    assert seen == [None]


def test_each_group_of_leaves_has_its_own_gramian():
    seen = []

    class Spy:
        needs = frozenset({"gramian"})

        def __call__(self, statistics):
            seen.append(statistics)
            return ga.Mean().weighting(statistics)

    matrix = signals(torch.float64)
    stack = {"a": matrix[:, :4], "b": 100 * matrix[:, 4:]}
    ga.Aggregator(Spy(), scope="leaf").aggregate(stack)
    found = seen[0].gramian * seen[0].scale[:, None, None] ** 2
    expected = torch.stack([leaf @ leaf.T for leaf in stack.values()])
    assert_close(found, expected)
