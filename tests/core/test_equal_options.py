"""Equal Agreement's options, and the powers of the Gram matrix that it is one of."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor
from torch.testing import assert_close

import gradagree_opt as ga
from gradagree_testing.reference import Array
from gradagree_testing.strategies import matrices, tensor


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def median_norm(signals: Tensor) -> float:
    return float(np.median(signals.norm(dim=1).numpy()))


# Options.


def test_a_leaf_of_its_own_scope_is_aggregated_by_itself():
    stack = {"w": rows(5, 6).reshape(5, 2, 3), "b": rows(5, 4, seed=1)}
    result = ga.EqualAgreement(scope="leaf").aggregate(stack)
    for index, leaf in enumerate(stack.values()):
        alone = ga.EqualAgreement().aggregate(leaf)
        assert_close(result.weights[index], alone.weights)
        for name in ("smallest_agreement", "largest_agreement", "agreement_spread"):
            assert_close(getattr(result.diagnostics, name)[index], getattr(alone.diagnostics, name))


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize(
    "method", [ga.EqualAgreement, ga.GradientAgreement, ga.NormClipped, ga.GeometricMedian]
)
def test_the_mean_takes_the_length_of_any_method_and_each_takes_the_mean_s(method, scope: str):
    stack = {"w": rows(5, 6).reshape(5, 2, 3), "b": rows(5, 4, seed=1)}

    def flat(tree: dict[str, Tensor]) -> Tensor:
        return torch.cat([leaf.flatten() for leaf in tree.values()])

    mean = torch.cat([leaf.mean(0).flatten() for leaf in stack.values()])
    theirs = flat(method(scope=scope)(stack))
    ours = flat(ga.Mean(match_norm=method(scope=scope))(stack))
    assert_close(ours, mean * theirs.norm() / mean.norm())
    matched = flat(method(scope=scope, match_norm="mean")(stack))
    assert_close(matched, theirs * mean.norm() / theirs.norm())
    if scope == "global":
        assert_close(flat(method(match_norm=ga.Mean())(stack)), matched)


def test_a_length_to_match_is_that_of_weights_of_the_same_scope():
    with pytest.raises(
        ValueError, match="expected match_norm with an aggregator of scope 'global'"
    ):
        ga.EqualAgreement(match_norm=ga.GradientAgreement(scope="leaf"))
    with pytest.raises(ValueError, match="expected match_norm with an aggregator whose weights"):
        ga.Mean(match_norm=ga.EqualAgreement(match_norm="mean"))


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf, 10**400, True, "0.1"])
def test_damping_is_a_positive_number(damping, without_type_checks: None):
    for make in (ga.EqualAgreement, lambda **options: ga.GramianPower(-1, **options)):
        with pytest.raises(ValueError, match="expected a positive number for damping, found"):
            make(damping=damping)


# The family.


@pytest.mark.parametrize("zeros", [0, 2, 5])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_the_power_0_is_the_mean_of_tasks_that_are_zero_too(zeros: int, scope: str):
    stack = {"w": rows(5, 6), "b": rows(5, 4, seed=1)}
    for leaf in stack.values():
        leaf[:zeros] = 0
    expected = {name: leaf.mean(0) for name, leaf in stack.items()}
    assert_close(ga.GramianPower(0, scope=scope)(stack), expected)


def power_of_eigenvalues(signals: Tensor, power: float) -> Tensor:
    """The weights Mᵏ 1/n by NumPy in float64."""
    n, gram = len(signals), (signals @ signals.T).double().numpy()
    values, vectors = np.linalg.eigh(gram)
    if power < 0:
        values = (values / (n * median_norm(signals) ** 2) + 0.01) / 1.01
    else:
        values = values / values.max()
    return torch.from_numpy(vectors @ np.diag(values**power) @ vectors.T @ np.full(n, 1 / n))


@pytest.mark.parametrize("power", [-2, -1.5, -0.5, 0.5, 1.5, 3])
def test_powers_are_those_of_the_eigenvalues(power: float):
    signals = rows(5, 8)
    expected = power_of_eigenvalues(signals, power)
    assert_close(ga.GramianPower(power).aggregate(signals).weights, expected)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("power", [-2, -0.5, 0.5])
def test_powers_in_float32_are_right_beside_a_large_task_whatever_its_place(
    power: float, place: int
):
    signals = rows(5, 40)
    signals[place] *= 1e4
    exact = power_of_eigenvalues(signals, power) @ signals
    found = ga.GramianPower(power)(signals.float()).double()
    assert (found - exact).norm() <= 1e-5 * exact.norm()


@given(matrices())
def test_the_first_power_is_gradient_agreement_up_to_its_length(matrix: Array):
    signals = tensor(matrix)
    agreement = ga.GradientAgreement().aggregate(signals)
    assume(not agreement.diagnostics.degenerate)
    power = ga.GramianPower(1).aggregate(signals)
    size = power.weights.abs().sum()
    assume(size > 1e-6)
    assert_close(power.weights / size, agreement.weights, rtol=1e-7, atol=1e-7)


def test_powers_go_through_the_updates_of_the_second_moment():
    """Jᵀ Gᵏ 1 = Cᵏ Jᵀ 1, C = Jᵀ J."""
    signals = rows(5, 8)
    moment = signals.T @ signals
    preconditioned = torch.linalg.matrix_power(moment, 2) @ signals.sum(0)
    update = ga.GramianPower(2)(signals)
    assert_close(update / update.norm(), preconditioned / preconditioned.norm())


@pytest.mark.parametrize("power", [math.nan, -math.inf, 10**400, True, "1", None, 1j])
def test_a_power_is_a_finite_number(power, without_type_checks: None):
    with pytest.raises(ValueError, match="expected a finite number for power, found"):
        ga.GramianPower(power)
