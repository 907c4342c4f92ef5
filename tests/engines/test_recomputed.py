"""Checkpointing: gradients equal those of the model without it, or are refused; never others."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import gradagree_opt as ga

AGREE = ga.GradientAgreement()
N = 4
DRAWS = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, 3, generator=DRAWS, dtype=torch.float64)
Y = torch.randn(N, 5, 1, generator=DRAWS, dtype=torch.float64)


class Net(nn.Module):
    """A layer that is checkpointed by one way or none, a frozen one beside it, and a head."""

    def __init__(self, way=None, reentrant=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.frozen, self.head = (
            nn.Linear(*sizes, dtype=torch.float64) for sizes in ((3, 4), (3, 4), (4, 1))
        )
        self.frozen.requires_grad_(False)
        self.way, self.options = way, {"use_reentrant": reentrant}

    def hidden(self, x):
        return (self.layer(x) + self.frozen(x)).tanh()

    def forward(self, x):
        if self.way == "method":
            return self.head(checkpoint(self.hidden, x, **self.options))
        if self.way == "module":
            layer = checkpoint(self.layer, x, **self.options)
            return self.head((layer + checkpoint(self.frozen, x, **self.options)).tanh())
        return self.head(self.hidden(x))


def trained(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def others(net):
    """Parameters that are not the module's own."""
    draws = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(p.shape, generator=draws, dtype=p.dtype) for n, p in trained(net).items()
    }


def loss_of(net):
    return lambda params, task: (functional_call(net, params, task[0]) - task[1]).square().mean()


def expected(params):
    """By a loop, without checkpointing."""
    loss_fn, names = loss_of(Net()), [*params]
    params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    gradients = [
        torch.autograd.grad(loss_fn(params, (x, y)), [*params.values()])
        for x, y in zip(X, Y, strict=True)
    ]
    stack = [torch.stack(each) for each in zip(*gradients, strict=True)]
    return AGREE(dict(zip(names, stack, strict=True)))


each_way = pytest.mark.parametrize("way", ["method", "module"])


@each_way
@pytest.mark.parametrize("engine", ["auto", "streamed"])
def test_a_module_is_computed_anew_from_its_own_parameters(way, engine):
    net = Net(way)
    params = {name: p.detach() for name, p in trained(net).items()}
    result = ga.aggregate_gradients(loss_of(net), params, (X, Y), AGREE, engine=engine)
    torch.testing.assert_close(result.update, expected(params), rtol=1e-12, atol=1e-12)


def test_trained_parameters_of_the_module_that_are_not_given_are_its_own():
    net = Net("method")
    params = {name: p.detach() for name, p in trained(net).items() if "head" in name}
    result = ga.aggregate_gradients(loss_of(net), params, (X, Y), AGREE, engine="streamed")
    torch.testing.assert_close(result.update, expected(params), rtol=1e-12, atol=1e-12)


@each_way
@pytest.mark.parametrize("engine", ["auto", "streamed"])
def test_a_module_is_not_computed_anew_from_others_than_it_was_given(way, engine):
    net = Net(way)
    message = r"found: checkpointing .* Linear anew .*; take a loop of TaskBatch\.add\(loss, …\)"
    with pytest.raises(RuntimeError, match=message):
        ga.aggregate_gradients(loss_of(net), others(net), (X, Y), AGREE, engine=engine)
    assert not torch.nn.modules.module._global_forward_pre_hooks


@each_way
@pytest.mark.parametrize("memory", ["graph", "stream"])
def test_the_advised_loop_takes_the_gradients(way, memory):
    net = Net(way)
    net.load_state_dict(others(net), strict=False)
    batch = ga.TaskBatch(net, AGREE, memory=memory)
    for x, y in zip(X, Y, strict=True):
        batch.add((net(x) - y).square().mean())
    batch.backward()
    found = {name: p.grad for name, p in trained(net).items()}
    torch.testing.assert_close(found, expected(others(net)), rtol=1e-12, atol=1e-12)


@each_way
def test_gradients_that_reentrant_checkpointing_keeps_to_itself_are_refused(way):
    net, x = Net(way, reentrant=True), X.clone().requires_grad_()
    params = {name: p.detach() for name, p in trained(net).items()}
    with pytest.raises(ValueError, match=r"use_reentrant=True, .* pass use_reentrant=False"):
        ga.aggregate_gradients(loss_of(net), params, (x, Y), AGREE, engine="streamed")


@each_way
@pytest.mark.parametrize("depth", ["its input is a leaf", "behind a trained layer"])
@pytest.mark.parametrize("memory", ["graph", "stream", "shared"])
@pytest.mark.parametrize("aggregator", [AGREE, ga.Mean()], ids=repr)
def test_a_loop_refuses_them_too(way, memory, depth, aggregator):
    first = nn.Linear(3, 3, dtype=torch.float64)
    net = Net(way, reentrant=True)
    model = nn.Sequential(first, net) if depth == "behind a trained layer" else net
    x = X.clone().requires_grad_()

    def run():
        if memory == "shared":
            losses = (model(x) - Y).square().mean((1, 2))
            ga.TaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), aggregator).step(losses)
            return
        batch = ga.TaskBatch(model, aggregator, memory=memory)
        for each, y in zip(x, Y, strict=True):
            batch.add((model(each) - y).square().mean())
        batch.backward()

    with pytest.raises(ValueError, match=r"use_reentrant=True, .* pass use_reentrant=False"):
        run()
    assert all(p.grad is None for p in trained(model).values())
