"""Modules that hold one submodule under two names: a functional call leaves its tensors there."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

import gradagree_opt as ga

AGREE = ga.GradientAgreement()
X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


class ByTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first

    def forward(self, x):
        return self.again(self.first(x).tanh())


class InADict(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.Linear(4, 4)
        self.parts = nn.ModuleDict({"a": nn.Sequential(inner), "b": inner})

    def forward(self, x):
        return self.parts["b"](self.parts["a"](x).tanh())


def twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def aggregated(engine, loss, params):
    return ga.aggregate_gradients(loss, params, X, AGREE, engine=engine).update


def stepped(make, loss, params):
    make(loss, ga.InnerSGD(0.1, 1)).step(params, {"support": X, "query": X}, AGREE)


def adapted(loss, params):
    ga.MAML(loss, ga.InnerSGD(0.1, 1)).adapt(params, X[0])


USES = {
    **{engine: partial(aggregated, engine) for engine in ("stacked", "matrix_free", "streamed")},
    "MAML": partial(stepped, ga.MAML),
    "Reptile": partial(stepped, ga.Reptile),
    "adapt": adapted,
}


@pytest.mark.parametrize("make", [twice, ByTwoNames, InADict])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_the_module_keeps_its_parameters(make, use):
    torch.manual_seed(0)
    module = make()
    before = dict(module.named_parameters())
    params = {name: p.detach() for name, p in before.items()}

    def loss_fn(params, x):
        return functional_call(module, params, (x,)).square().sum()

    update = use(loss_fn, params)
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    if update is not None:
        rows = []
        for x in X:
            grads = torch.autograd.grad(module(x).square().sum(), [*before.values()])
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        expected = AGREE(torch.stack(rows))
        found = torch.cat([leaf.flatten() for leaf in update.values()])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
