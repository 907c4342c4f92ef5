"""What docs/recipes.md says of accumulation under Accelerate, on one process."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
PARTS = 3


@pytest.fixture
def accelerator(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # Lightning leaves some
        monkeypatch.delenv(name, raising=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def trained(model, accelerator, fill):
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    for part in X.split(4):
        with accelerator.accumulate(model):
            fill(model, optimizer, (model(part) ** 2).mean(0))
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("wrapped", [False, True], ids=["batch", "optimizer"])
def test_divided_losses_accumulate_as_under_accelerate(accelerator, wrapped):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def before(_, optimizer, losses):
        accelerator.backward(losses.mean())
        optimizer.step()

    def after(model, optimizer, losses):
        losses = losses / accelerator.gradient_accumulation_steps
        if wrapped:
            ga.TaskOptimizer(optimizer, ga.Mean()).step(losses)
            return
        batch = ga.TaskBatch(model, ga.Mean())
        for loss in losses:
            batch.add(loss)
        batch.backward()
        optimizer.step()

    expected = trained(copy.deepcopy(model), accelerator, before)
    torch.testing.assert_close(trained(copy.deepcopy(model), accelerator, after), expected)
    assert not torch.equal(expected[0], model[0].weight)
