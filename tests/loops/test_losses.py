"""The losses of the tasks, which scripts print, come with the aggregation of every loop."""

import pytest
import torch
from torch import nn

import gradagree_opt as ga

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def adapted_from(module, x):
    params = dict(module.named_parameters())
    loss = module(x).square().sum()
    grads = torch.autograd.grad(loss, params.values(), create_graph=True)
    return {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}


@pytest.mark.parametrize("memory", ["graph", "stream"])
@pytest.mark.parametrize("nonfinite", ["raise", "drop"])
def test_of_a_task_batch_in_both_forms_with_losses(module, memory, nonfinite):
    batch = ga.TaskBatch(module, ga.GradientAgreement(nonfinite=nonfinite), memory=memory)
    for _ in range(2):
        losses = [module(x).square().sum() for x in X]
        for loss in losses:
            batch.add(loss)
        result = batch.backward()
        assert result.losses.tolist() == [loss.item() for loss in losses]
        assert not result.losses.requires_grad
    after = [adapted_from(module, x) for x in X]
    losses = [
        torch.func.functional_call(module, a, (x,)).sum() for a, x in zip(after, X, strict=True)
    ]
    for loss, adapted in zip(losses, after, strict=True):
        batch.add(loss, adapted=adapted)
    assert batch.backward().losses.mean().item() == torch.stack(losses).mean().item()


def test_the_reptile_form_has_none(module):
    batch = ga.TaskBatch(module, ga.Mean())
    batch.add(adapted=adapted_from(module, X[0]))
    assert batch.backward().losses is None


@pytest.mark.parametrize("stacked", [True, False])
def test_of_a_task_optimizer(module, stacked):
    losses = [module(x).square().sum() for x in X]
    optimizer = ga.TaskOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), ga.Mean())
    result = optimizer.step(torch.stack(losses) if stacked else losses)
    assert result.losses.tolist() == [loss.item() for loss in losses]


def test_of_torchopts_optimizers(module):
    torchopt = pytest.importorskip("torchopt")
    from gradagree_opt.adapters.torchopt import weighted_loss

    losses = [module(x).square().sum() for x in X]
    expected = [loss.item() for loss in losses]
    assert weighted_loss(losses, module, ga.Mean()).aggregation.losses.tolist() == expected
    optimizer = ga.TaskOptimizer(torchopt.SGD(module.parameters(), lr=0.1), ga.Mean())
    assert optimizer.step(losses).losses.tolist() == expected
