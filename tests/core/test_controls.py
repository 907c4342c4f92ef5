"""The methods that Gradient Agreement is compared with."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import gradagree_opt as ga


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stack() -> dict[str, Tensor]:
    generator = seeded(3)
    return {
        "w": torch.randn(7, 3, 2, generator=generator),
        "b": torch.randn(7, generator=generator),
    }


def test_the_mean_is_the_mean_and_the_sum_is_n_times_it():
    grads = stack()
    mean = tree_map(lambda leaf: leaf.mean(0), grads)
    assert_close(ga.Mean()(grads), mean)
    assert_close(ga.Sum()(grads), tree_map(lambda leaf: 7 * leaf, mean))
    assert ga.Sum().aggregate(grads).weights.tolist() == [1.0] * 7


def test_the_mean_is_not_moved_by_signals():
    grads = stack()
    assert_close(ga.Mean()(grads), ga.Mean().aggregate(grads, torch.randn(7, 5)).update)


def test_norm_share_ignores_who_agrees():
    grads = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0]])
    result = ga.NormShare().aggregate(grads)
    assert_close(result.weights, torch.tensor([9 / 19, 9 / 19, 1 / 19]))
    assert_close(result.update, torch.tensor([0.0, 1 / 19]))


def test_norm_share_of_zero_gradients_is_uniform():
    assert ga.NormShare().aggregate(torch.zeros(4, 2)).weights.tolist() == [0.25] * 4


def test_every_method_reports_the_agreement_scores():
    grads = stack()
    scores = ga.GradientAgreement().aggregate(grads).scores
    for control in (ga.Mean(), ga.Sum(), ga.NormShare(), ga.RandomWeights(seeded())):
        assert_close(control.aggregate(grads).scores, scores)


def test_random_weights_are_positive_and_add_to_one():
    random = ga.RandomWeights(seeded())
    for _ in range(20):
        weights = random.aggregate(stack()).weights
        assert (weights > 0).all()
        assert_close(weights.sum().item(), 1.0)


def test_random_weights_differ_between_calls_and_repeat_with_the_generator():
    def three(seed: int) -> Tensor:
        random = ga.RandomWeights(seeded(seed))
        return torch.stack([random.aggregate(stack()).weights for _ in range(3)])

    first = three(0)
    assert not first[0].allclose(first[1])
    assert not first[1].allclose(first[2])
    assert three(0).equal(first)
    assert not three(1).allclose(first)


def test_random_weights_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    ga.RandomWeights(seeded())(stack())
    assert torch.get_rng_state().equal(before)


def test_random_weights_are_uniform_on_the_simplex(without_type_checks: None):
    """Then w_i ~ Beta(1, n − 1): mean 1/n, P(w_i > t) = (1 − t)^(n − 1), correlation −1/(n − 1)."""
    n, draws = 4, 2000
    random = ga.RandomWeights(seeded())
    grads = torch.ones(n, 1)
    weights = torch.stack([random.aggregate_unchecked(grads).weights for _ in range(draws)])
    standard_error = 0.5 / draws**0.5
    for t in (0.1, 0.25, 0.5, 0.75):
        share = (weights > t).double().mean(0)
        expected = torch.full_like(share, (1 - t) ** (n - 1))
        assert_close(share, expected, rtol=0, atol=5 * standard_error)
    correlation = torch.corrcoef(weights.T)[~torch.eye(n, dtype=torch.bool)]
    assert_close(correlation, torch.full_like(correlation, -1 / (n - 1)), rtol=0, atol=0.1)


def test_random_weights_do_not_depend_on_the_gradients():
    weights = [
        ga.RandomWeights(seeded(5)).aggregate(grads).weights
        for grads in (stack(), tree_map(lambda leaf: leaf.flip(0) * 100, stack()))
    ]
    assert_close(weights[0], weights[1])


def test_draws_made_beforehand_take_the_place_of_the_generator():
    random = ga.RandomWeights(seeded(2))
    expected = random.aggregate(stack())
    random = ga.RandomWeights(seeded(2))
    draws = random.draw(7)
    random.draw(7)
    given = random.holding(draws).aggregate_unchecked(stack())
    assert given.weights.equal(expected.weights)


@pytest.mark.parametrize("make", [ga.GradientAgreement, ga.Mean, ga.Sum, ga.NormShare])
def test_only_random_weights_draw(make: type[ga.Aggregator]):
    aggregator = make()
    assert aggregator.for_batch(5) is aggregator


def test_what_is_held_for_a_batch_is_drawn_once():
    random = ga.RandomWeights(seeded(2))
    held = random.for_batch(7)
    assert held.for_batch(7) is held
    first, again = held.aggregate(stack()), held.aggregate(stack())
    assert first.weights.equal(again.weights)
    assert not random.aggregate(stack()).weights.equal(first.weights)
