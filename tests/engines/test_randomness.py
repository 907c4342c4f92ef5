"""Dropout under every engine."""

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, mse_loss

import gradagree_opt as ga

from .models import Model

SIZE = 200
TASKS = torch.arange(1.0, 5.0, dtype=torch.float64).unsqueeze(1).expand(4, SIZE)
PARAMS = torch.ones(SIZE, dtype=torch.float64)
each_engine = pytest.mark.parametrize("engine", ["stacked", "streamed", "matrix_free"])


def linear_loss(params, x):
    """Its gradient is the mask of the task times 2 x, and the loss the sum of that."""
    return (dropout(params, 0.5) * x).sum()


def masks(randomness, chunk_size=None):
    torch.manual_seed(3)
    gradients, losses = ga.task_gradients(
        linear_loss, PARAMS, TASKS, randomness=randomness, chunk_size=chunk_size
    )
    torch.testing.assert_close(gradients.sum(1), losses, rtol=1e-12, atol=0)
    found = gradients / (2 * TASKS)
    assert ((found == 0) | (found == 1)).all()
    assert 0.3 < found.mean() < 0.7
    return found


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_different_draws_for_each_task(chunk_size):
    found = masks("different", chunk_size)
    assert not any(torch.equal(found[i], found[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_same_draws_once_for_all(chunk_size):
    found = masks("same", chunk_size)
    assert torch.equal(found, found[:1].expand_as(found))


def test_error_refuses_to_draw_under_vmap():
    with pytest.raises(RuntimeError, match="random"):
        ga.task_gradients(linear_loss, PARAMS, TASKS)


@each_engine
@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_every_pass_of_an_engine_sees_the_same_masks(engine, randomness, chunk_size):
    torch.manual_seed(3)
    result = ga.aggregate_gradients(
        linear_loss,
        PARAMS,
        TASKS,
        ga.GradientAgreement(),
        engine=engine,
        randomness=randomness,
        chunk_size=chunk_size,
    )
    one_by_one = engine == "streamed" or chunk_size == 1
    gradients = 2 * TASKS * masks(randomness, 1 if one_by_one else None)
    expected = ga.GradientAgreement().aggregate(gradients)
    torch.testing.assert_close(result.losses, gradients.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.update, expected.update, rtol=1e-12, atol=0)


@each_engine
def test_the_random_numbers_after_a_call_are_new_ones(engine):
    options = {"engine": engine, "randomness": "different"}
    torch.manual_seed(3)
    first, second = (
        ga.aggregate_gradients(linear_loss, PARAMS, TASKS, ga.Mean(), **options) for _ in range(2)
    )
    assert not torch.equal(first.update, second.update)


@each_engine
def test_a_network_with_one_mask_for_all_equals_a_loop_that_starts_from_one_seed(engine):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 16), nn.Dropout(), nn.Linear(16, 2)).double()
        tasks = (torch.randn(5, 6, 3).double(), torch.randn(5, 6, 2).double())
    case = Model(module, mse_loss, tasks)
    torch.manual_seed(5)
    result = ga.aggregate_gradients(
        case.loss_fn, case.params, tasks, ga.GradientAgreement(), engine=engine, randomness="same"
    )
    gradients = {name: [] for name in case.params}
    for x, y in zip(*tasks, strict=True):
        torch.manual_seed(5)
        module.zero_grad()
        mse_loss(module(x), y).backward()
        for name, p in module.named_parameters():
            gradients[name].append(p.grad)
    stack = {name: torch.stack(each) for name, each in gradients.items()}
    expected = ga.GradientAgreement().aggregate(stack)
    torch.testing.assert_close(result.update, expected.update, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("engine", ["one_backward", "stacked", "streamed"])
def test_maml_draws_for_each_task_and_step(engine):
    torch.manual_seed(3)
    maml = ga.MAML(linear_loss, ga.InnerSGD(0.0, 1), engine=engine, randomness="different")
    result = maml.step(PARAMS, {"support": TASKS, "query": TASKS}, ga.Mean())
    # Of an inner rate of 0, the meta-gradients are the query masks times 2 x.
    torch.testing.assert_close(result.update.sum() * 4, result.losses.sum())
    kept = result.losses / (2 * TASKS.sum(1))
    assert len(set(kept.tolist())) > 1
