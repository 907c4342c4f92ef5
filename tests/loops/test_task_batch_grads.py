"""What TaskBatch leaves in ``.grad``: what ``backward()`` of the mean loss would leave there."""

import pytest
import torch
from torch import nn

import gradagree_opt as ga

POINTS = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def add(batch, module):
    for x in POINTS:
        batch.add(module(x.unsqueeze(0)).sum())


def test_a_grad_that_is_there_is_added_to_in_its_place():
    """As of flat buffers that a communication or an optimizer looks at."""
    module = nn.Linear(2, 1)
    buffer = torch.ones(3)
    module.weight.grad, module.bias.grad = buffer[:2].view(1, 2), buffer[2:]
    batch = ga.TaskBatch(module, ga.Mean())
    add(batch, module)
    batch.backward()
    torch.testing.assert_close(buffer, 1 + torch.tensor([*POINTS.mean(0), 1.0]))


def test_a_grad_with_a_graph_is_left_as_it_is_and_a_new_one_takes_its_place():
    module = nn.Linear(2, 1)
    loss = module(POINTS).square().sum()
    [first] = torch.autograd.grad(loss, [module.weight], create_graph=True)
    module.weight.grad = first
    before = first.detach().clone()
    batch = ga.TaskBatch(module, ga.Mean())
    add(batch, module)
    batch.backward()
    assert torch.equal(first, before)
    torch.testing.assert_close(module.weight.grad.detach(), before + POINTS.mean(0))


def test_a_sparse_grad_is_added_to():
    module = nn.Embedding(5, 2, sparse=True)
    module(torch.tensor([0])).sum().backward()
    batch = ga.TaskBatch(module, ga.Mean())
    for row in (0, 1):
        batch.add(module(torch.tensor([row])).sum())
    batch.backward()
    expected = torch.zeros(5, 2)
    expected[0], expected[1] = 1.5, 0.5
    torch.testing.assert_close(module.weight.grad, expected)


@pytest.mark.parametrize("memory", ["graph", "stream"])
def test_a_batch_follows_what_is_frozen_and_unfrozen_between_its_uses(memory):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    batch = ga.TaskBatch(module, ga.Mean(), memory=memory)
    for trained in (["1.weight", "1.bias"], ["0.weight", "0.bias", "1.weight", "1.bias"]):
        for _ in range(2):  # frozen, then not, and again
            module.zero_grad()
            module[0].requires_grad_("0.weight" in trained)
            add(batch, module)
            assert sorted(batch.backward().update) == sorted(trained)
            found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            module.zero_grad()
            (module(POINTS).sum() / len(POINTS)).backward()
            assert sorted(found) == sorted(trained)
            for name in trained:
                torch.testing.assert_close(found[name], module.get_parameter(name).grad)
