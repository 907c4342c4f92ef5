"""What hangs on the accumulation of ``.grad``, as an optimizer in the backward pass, runs."""

import copy

import pytest
import torch
from gradagree_opt.adapters import plain
from torch import nn

import gradagree_opt as ga

RATE = 0.1
X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def losses_of(module):
    return [module(x).square().sum() for x in X]


def add_losses(batch, module):
    for loss in losses_of(module):
        batch.add(loss)


def add_adapted(batch, module):
    """MAML by hand: one step of gradient descent, of second order."""
    params = dict(module.named_parameters())
    for x in X:
        loss = module(x).square().sum()
        grads = torch.autograd.grad(loss, params.values(), create_graph=True)
        after = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
        batch.add(
            (torch.func.functional_call(module, after, (x,)) - 1).square().sum(), adapted=after
        )


def add_displacements(batch, module):
    for x in X:
        learner = copy.deepcopy(module)
        learner(x).square().sum().backward()
        torch.optim.SGD(learner.parameters(), lr=0.1).step()
        batch.add(adapted=learner)


FORMS = [add_losses, add_adapted, add_displacements]
each_form = pytest.mark.parametrize("add", FORMS)


def step_in_backward(module):
    """The optimizer in the backward pass of PyTorch's tutorial: a step for each parameter."""
    for parameter in module.parameters():
        optimizer = torch.optim.SGD([parameter], lr=RATE, weight_decay=0.1)

        def hook(parameter, optimizer=optimizer):
            optimizer.step()
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(hook)


def stepped(module):
    """The step that comes after the pass."""
    torch.optim.SGD(module.parameters(), lr=RATE, weight_decay=0.1).step()
    return [parameter.detach() for parameter in module.parameters()]


@each_form
@pytest.mark.parametrize("memory", ["graph", "stream"])
@pytest.mark.parametrize("aggregator", [ga.Mean(), ga.GradientAgreement(scope="leaf")])
def test_an_optimizer_in_the_backward_pass_steps_once(module, add, memory, aggregator):
    twin = copy.deepcopy(module)
    step_in_backward(module)
    for each in (module, twin):
        batch = ga.TaskBatch(each, aggregator, memory=memory)
        add(batch, each)
        batch.backward()
    torch.testing.assert_close([p.detach() for p in module.parameters()], stepped(twin))
    assert all(p.grad is None for p in module.parameters())


@each_form
def test_a_hook_on_the_node_that_accumulates_runs_once(module, add):
    """As data parallelism outside of PyTorch has it."""
    seen = []
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in module.parameters()]
    for node, parameter in zip(nodes, module.parameters(), strict=True):
        node.register_hook(lambda *_, parameter=parameter: seen.append(parameter.grad.clone()))
    batch = ga.TaskBatch(module, ga.GradientAgreement())
    add(batch, module)
    result = batch.backward()
    assert sorted(map(str, seen)) == sorted(map(str, result.update.values()))


@each_form
def test_it_runs_beside_a_hook_that_has_seen_the_gradients_of_the_tasks(module, add):
    twin = copy.deepcopy(module)
    for each in (module, twin):
        each[0].weight.register_hook(lambda gradient: 2 * gradient)
    step_in_backward(module)
    for each in (module, twin):
        batch = ga.TaskBatch(each, ga.Sum())
        add(batch, each)
        batch.backward()
    torch.testing.assert_close([p.detach() for p in module.parameters()], stepped(twin))


def test_task_optimizer_runs_it(module):
    twin = copy.deepcopy(module)
    step_in_backward(module)
    ga.TaskOptimizer(torch.optim.SGD(module.parameters(), lr=1e3), ga.Mean()).step(
        losses_of(module)
    )
    torch.stack(losses_of(twin)).mean().backward()
    torch.testing.assert_close([p.detach() for p in module.parameters()], stepped(twin))


def test_the_loop_that_comes_with_the_library_runs_it():
    w, seen = torch.tensor(0.0, requires_grad=True), []
    w.register_post_accumulate_grad_hook(lambda w: seen.append(w.grad.item()))
    maml = ga.MAML(lambda w, x: ((w - x) ** 2).mean(), ga.InnerSGD(lr=0.25, steps=1))
    tasks = {"support": torch.tensor([[1.0], [3.0]]), "query": torch.tensor([[1.0], [3.0]])}
    optimizer = torch.optim.SGD([w], lr=1.0)
    plain.train(maml, w, lambda _: tasks, optimizer, ga.Mean(), iterations=2)
    assert seen == [-1.0, -0.5]
