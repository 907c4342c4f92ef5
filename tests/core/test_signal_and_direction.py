"""What agreement is measured on, what is combined, and how long the combination is."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import gradagree_opt as ga
from gradagree_testing import reference
from gradagree_testing.configurations import CONFIGURATIONS, Configuration
from gradagree_testing.reference import exact


def rows(seed: int, d: int = 7, n: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=dtype)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


UNMATCHED = [c for c in CONFIGURATIONS if c.weights is not None and not c.amplifies]


@pytest.mark.parametrize("configuration", UNMATCHED, ids=str)
def test_weights_come_from_the_signal_alone_and_combine_the_directions(
    configuration: Configuration,
):
    directions, signal = {"w": rows(0), "b": rows(1, 2)}, [rows(2, 11)]
    gram = reference.gram(exact(signal[0]))
    expected = torch.tensor(configuration.weights(gram).astype(float))
    result = configuration.make().aggregate(directions, signal)
    assert_close(result.weights, expected)
    assert_close(result.update, {key: expected @ leaf for key, leaf in directions.items()})
    assert_close(result.scores, configuration.make().aggregate(signal).scores)


def test_the_directions_as_their_own_signal_change_nothing():
    directions = rows(0)
    alone = ga.GradientAgreement().aggregate(directions)
    pair = ga.GradientAgreement().aggregate(directions, signal=directions)
    assert_close(pair.weights, alone.weights)
    assert_close(pair.update, alone.update)


def test_the_signal_may_have_another_dtype_than_the_directions():
    directions, signal = rows(0).bfloat16(), rows(1)
    result = ga.GradientAgreement().aggregate(directions, signal)
    assert result.weights.dtype == torch.float64
    assert result.update.dtype == torch.bfloat16
    assert_close(result.weights, ga.agreement_weights(signal))
    assert_close(result.update, (result.weights @ directions.double()).bfloat16())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("with_signal", [False, True])
def test_agreement_matched_to_the_mean_has_its_norm_and_the_direction_of_agreement(
    scale: float, with_signal: bool
):
    directions = rows(0, dtype=torch.float32) * scale
    signal = rows(1, dtype=torch.float32) if with_signal else None
    plain = ga.GradientAgreement().aggregate(directions, signal)
    matched = ga.GradientAgreement(match_norm="mean").aggregate(directions, signal)
    mean = directions.double().mean(0)
    update = matched.update.double()
    assert_close(update.norm(), mean.norm(), rtol=1e-6, atol=0)
    assert_close(unit(update), unit(plain.update.double()), rtol=0, atol=1e-6)
    assert_close(unit(matched.weights), unit(plain.weights))
    assert_close(matched.diagnostics.update_norm.double(), mean.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("with_signal", [False, True])
def test_the_mean_matched_to_agreement_has_its_norm_and_the_direction_of_the_mean(
    scale: float, with_signal: bool
):
    directions = rows(0, dtype=torch.float32) * scale
    signal = rows(1, dtype=torch.float32) if with_signal else None
    agreement = ga.GradientAgreement().aggregate(directions, signal).update.double()
    matched = ga.Mean(match_norm="agreement").aggregate(directions, signal)
    mean = directions.double().mean(0)
    update = matched.update.double()
    assert_close(update.norm(), agreement.norm(), rtol=1e-6, atol=0)
    assert_close(unit(update), unit(mean), rtol=0, atol=1e-6)
    assert (matched.weights == matched.weights[0]).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_norms_are_matched_up_to_the_rounding_of_an_entry(
    dtype: torch.dtype, seed: int
):
    directions = (0.2 + rows(seed, d=20_000)).to(dtype)
    update = ga.GradientAgreement(match_norm="mean")(directions).double()
    mean = directions.double().mean(0)
    assert_close(update.norm(), mean.norm(), rtol=torch.finfo(dtype).eps / 2, atol=0)


@pytest.mark.parametrize(
    ("matched", "direction", "length"),
    [
        (ga.Mean(match_norm="agreement"), ga.Mean(), ga.GradientAgreement()),
        (ga.GradientAgreement(match_norm="mean"), ga.GradientAgreement(), ga.Mean()),
        (ga.NormClipped(match_norm=ga.GramianPower(2)), ga.NormClipped(), ga.GramianPower(2)),
    ],
    ids=["mean", "agreement", "clipped"],
)
def test_a_norm_is_matched_where_those_of_the_tasks_overflow(
    matched: ga.Aggregator, direction: ga.Aggregator, length: ga.Aggregator
):
    large, half = 2.5e38, 1.25e38
    tasks = torch.tensor([[large, large, 0.0], [0.0, large, large], [0.0, 0.0, half]])
    assert tasks.norm(dim=1)[:2].isinf().all()
    update = matched(tasks).double()
    assert_close(unit(update), unit(direction(tasks.double())), rtol=1e-6, atol=1e-6)
    assert_close(update.norm(), length(tasks.double()).norm(), rtol=1e-6, atol=0)


def test_an_update_of_zero_has_no_norm_to_match():
    for aggregator in (ga.GradientAgreement(match_norm="mean"), ga.Mean(match_norm="agreement")):
        result = aggregator.aggregate(torch.zeros(4, 3))
        assert result.update.tolist() == [0.0, 0.0, 0.0]
        assert_close(result.weights, torch.full((4,), 0.25))


def test_weights_are_constants_of_differentiation():
    """dL/dg_i = w_i · dL/du: nothing flows through the weights."""
    directions = rows(0).requires_grad_()
    result = ga.GradientAgreement().aggregate(directions)
    assert not result.weights.requires_grad
    assert not result.scores.requires_grad
    cotangent = rows(9)[0]
    (gradient,) = torch.autograd.grad(result.update @ cotangent, directions)
    assert_close(gradient, torch.outer(result.weights, cotangent))


def test_no_gradient_reaches_the_signal():
    directions, signal = rows(0).requires_grad_(), rows(1).requires_grad_()
    update = ga.GradientAgreement(match_norm="mean").aggregate(directions, signal).update
    gradients = torch.autograd.grad(update.sum(), (directions, signal), allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None


@pytest.mark.parametrize(
    "aggregator",
    [ga.GradientAgreement(match_norm="mean"), ga.Mean(match_norm="agreement")],
    ids=["agreement", "mean"],
)
def test_the_factor_that_matches_norms_is_a_constant_of_differentiation(
    aggregator: ga.Aggregator,
):
    directions = rows(0).requires_grad_()
    result = aggregator.aggregate(directions)
    cotangent = rows(9)[0]
    (gradient,) = torch.autograd.grad(result.update @ cotangent, directions)
    assert_close(gradient, torch.outer(result.weights, cotangent))
    assert not result.weights.requires_grad


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_diagnostics_hold_no_graph(configuration: Configuration):
    result = configuration.make().aggregate(rows(0).requires_grad_())
    assert result.update.requires_grad
    assert not any(value.requires_grad for value in result.diagnostics)
