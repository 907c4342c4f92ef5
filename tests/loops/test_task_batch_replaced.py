"""A TaskBatch that lives on while its model gets new parameters."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
AGREE = ga.GradientAgreement()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def new_head(module, params):
    module.head = nn.Linear(3, 2)


def new_weight(module, params):
    module.body.weight = nn.Parameter(torch.ones(3, 2))


def added_layer(module, params):
    module.head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))


CHANGES = [new_head, new_weight, added_layer]


def losses(batch, module):
    for x in X:
        batch.add(module(x).square().sum())


def learners(batch, module, *, loss=True):
    for x in X:
        params = dict(module.named_parameters())
        inner = module(x).square().sum()
        grads = torch.autograd.grad(inner, params.values(), create_graph=True)
        after = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
        outer = torch.func.functional_call(module, after, (x,)).sum()
        batch.add(*[outer] * loss, adapted=after)


def displacements(batch, module):
    learners(batch, module, loss=False)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Network()


@pytest.mark.parametrize("add", [losses, learners, displacements])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("memory", ["graph", "stream"])
@pytest.mark.parametrize("source", ["module", "dict", "list"])
def test_the_next_batch_is_that_of_the_model_as_it_is(module, add, change, memory, source):
    given = {
        "module": module,
        "dict": dict(module.named_parameters()),
        "list": list(module.parameters()),
    }[source]
    batch = ga.TaskBatch(given, AGREE, memory=memory)
    add(batch, module)
    batch.backward()
    change(module, given)
    if source == "dict":
        given.clear()
        given.update(module.named_parameters())
    elif source == "list":
        given[:] = module.parameters()
    module.zero_grad()
    twin = copy.deepcopy(module)
    add(batch, module)
    result = batch.backward()
    fresh = ga.TaskBatch(twin, AGREE, memory=memory)
    add(fresh, twin)
    expected = fresh.backward()
    torch.testing.assert_close(result.weights, expected.weights)
    assert all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close([p.grad for p in module.parameters()], [*expected.update.values()])


@pytest.mark.parametrize("add", [losses, learners, displacements])
@pytest.mark.parametrize("change", CHANGES)
def test_within_a_batch_it_is_refused_and_no_grad_is_touched(module, add, change):
    batch = ga.TaskBatch(module, AGREE)
    add(batch, module)
    change(module, None)
    with pytest.raises(ValueError, match="replaced, added or removed; change the model between"):
        batch.backward()
    assert len(batch) == 0 and all(p.grad is None for p in module.parameters())


def freeze_all_but_the_head(module):
    module.body.requires_grad_(False)


def freeze_one(module):
    module.head.bias.requires_grad_(False)


def unfreeze(module):
    module.head.weight.requires_grad_(True)


FREEZING = [
    (add, change)
    for add in (losses, learners, displacements)
    for change in (freeze_all_but_the_head, freeze_one)
]


@pytest.mark.parametrize(("add", "change"), [*FREEZING, (losses, unfreeze)])
@pytest.mark.parametrize("memory", ["graph", "stream"])
def test_a_parameter_frozen_within_a_batch_is_refused_as_well(module, add, change, memory):
    module.head.weight.requires_grad_(change is not unfreeze)
    batch = ga.TaskBatch(module, AGREE, memory=memory)
    add(batch, module)
    change(module)
    with pytest.raises(ValueError, match=r"found '.*' frozen or unfrozen; change the model"):
        batch.backward()
    assert len(batch) == 0 and all(p.grad is None for p in module.parameters())
