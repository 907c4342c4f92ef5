"""Models of torch.compile in a loop of one's own, after a plain backward pass has compiled them."""

import pytest
import torch
from torch import nn

import gradagree_opt as ga

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.compiled


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 1)]
    return nn.Sequential(*layers)


@pytest.fixture
def compiled(model):
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X[0]).square().mean().backward()  # which decides what the pass gives away
    model.zero_grad()
    return compiled


def by_task_batch(model, losses, memory="graph"):
    batch = ga.TaskBatch(model, ga.GradientAgreement(), memory=memory)
    for loss in losses:
        batch.add(loss)
    return batch.backward().update


def by_stream(model, losses):
    return by_task_batch(model, losses, memory="stream")


def by_task_optimizer(model, losses):
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.0)
    return ga.TaskOptimizer(optimizer, ga.GradientAgreement()).step(losses).update


@pytest.mark.parametrize("step", [by_task_batch, by_stream, by_task_optimizer])
def test_with_a_forward_pass_for_each_task_it_works(model, compiled, step):
    expected = by_task_batch(model, [model(x).square().mean() for x in X])
    found = step(model, [compiled(x).square().mean() for x in X])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("step", [by_task_batch, by_task_optimizer])
def test_with_one_forward_pass_for_all_one_sentence_tells_the_cure(model, compiled, step):
    with pytest.raises(ValueError, match=r"donated_buffer = False before the model is") as caught:
        step(model, [each.square().mean() for each in compiled(X[0])])
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


def test_the_cure_helps(model, monkeypatch):
    monkeypatch.setattr("torch._functorch.config.donated_buffer", False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X[0]).square().mean().backward()
    expected = by_task_batch(model, [each.square().mean() for each in model(X[0])])
    found = by_task_batch(model, [each.square().mean() for each in compiled(X[0])])
    torch.testing.assert_close(found, expected)
