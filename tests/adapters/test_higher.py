"""Gradient Agreement in higher's inner loops, and its loop over a meta-batch."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga
from gradagree_testing.configurations import METHODS, PAPER
from gradagree_testing.memory import saved_bytes

higher = pytest.importorskip("higher", reason="higher is not installed")

from gradagree_opt.adapters.higher import meta_step  # noqa: E402

from .higher_cases import INNER, adapted, loop, one_by_one  # noqa: E402
from .learners import (  # noqa: E402
    RATE,
    STEPS,
    TASKS,
    TOLERANCES,
    assert_near,
    detached,
    draw,
    each,
    functional,
    grads,
    mse,
    network,
    vector,
)

each_order = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])
each_method = pytest.mark.parametrize("method", METHODS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])


@each_order
@each_memory
@each_dtype
@pytest.mark.parametrize("aggregator", [ga.GradientAgreement(), ga.Mean()], ids=["ga", "mean"])
def test_the_loop_equals_the_pure_function(first_order, memory, dtype, aggregator):
    net, tasks = network(dtype), draw(dtype=dtype)
    pure = ga.MAML(functional(net), ga.InnerSGD(RATE, STEPS), first_order=first_order)
    expected = pure.step(detached(net), tasks, aggregator)
    inner = INNER["sgd"](net.parameters())
    result = loop(net, inner, tasks, aggregator, first_order=first_order, memory=memory)
    assert_near(grads(net), vector(expected.update.values()), TOLERANCES[dtype])
    torch.testing.assert_close(result.weights, expected.weights)


@pytest.mark.parametrize("optimizer", INNER)
@each_order
@each_memory
@each_method
def test_every_optimizer_equals_the_formulas_on_tasks_taken_one_by_one(
    optimizer, first_order, memory, method
):
    net, tasks = network(), draw()
    inner = INNER[optimizer](net.parameters())
    displacements, gradients = one_by_one(net, inner, tasks, first_order)
    weights = method.weigh_adapted(displacements, gradients)
    result = loop(net, inner, tasks, method.make(), first_order=first_order, memory=memory)
    assert_near(result.weights, weights, 1e-12)
    assert_near(grads(net), weights @ gradients, 1e-12)


@each_memory
@each_method
def test_a_step_equals_them_too(memory, method):
    net, tasks = network(), draw()
    inner = INNER["adam"](net.parameters())
    displacements, gradients = one_by_one(net, inner, tasks, False)
    meta_step(net, inner, mse, tasks, method.make(), steps=STEPS, memory=memory)
    assert_near(grads(net), method.weigh_adapted(displacements, gradients) @ gradients, 1e-12)


def test_the_mean_equals_highers_own_loop():
    ours, theirs = network(), network()
    loop(ours, INNER["adam"](ours.parameters()), draw(), ga.Mean())
    inner = INNER["adam"](theirs.parameters())
    for task in each(draw()):
        (mse(adapted(theirs, inner, task, False), task["query"]) / TASKS).backward()
    assert_near(grads(ours), grads(theirs), 1e-12)


@pytest.mark.parametrize("optimizer", INNER)
@each_order
@each_memory
@pytest.mark.parametrize(
    "aggregator",
    [
        ga.GradientAgreement(),
        ga.GradientAgreement(scope="leaf"),
        ga.GradientAgreement(match_norm="mean"),
        ga.GradientAgreement(nonfinite="drop"),
    ],
    ids=["paper", "leaf", "matched", "drop"],
)
def test_a_step_equals_the_loop(optimizer, first_order, memory, aggregator):
    looped, stepped = network(), network()
    inner = INNER[optimizer](looped.parameters())
    expected = loop(looped, inner, draw(), aggregator, first_order=first_order)
    result = meta_step(
        stepped,
        INNER[optimizer](stepped.parameters()),
        mse,
        draw(),
        aggregator,
        steps=STEPS,
        first_order=first_order,
        memory=memory,
    )
    assert_near(grads(stepped), grads(looped), 1e-12)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-11, atol=1e-14)
    one_by_one = aggregator.nonfinite == "drop" or aggregator.scope != "global"
    shared = memory == "graph" and not one_by_one
    assert result.engine == ("one_backward" if shared else "stacked")


def test_losses_of_a_step_are_those_after_adaptation():
    net = network()
    inner = INNER["sgd"](net.parameters())
    result = meta_step(net, inner, mse, draw(), ga.Mean(), steps=STEPS)
    expected = [mse(adapted(net, inner, task, False), task["query"]) for task in each(draw())]
    torch.testing.assert_close(result.losses, torch.stack(expected).detach())
    assert not result.losses.requires_grad


@each_order
@each_memory
def test_frozen_and_unused_parameters_are_left_alone(first_order, memory):
    net = network()
    net[0].requires_grad_(False)
    net.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    trained = {"2.weight": net[2].weight.detach(), "2.bias": net[2].bias.detach()}
    frozen = {"0.weight": net[0].weight, "0.bias": net[0].bias}
    expected = ga.MAML(
        lambda params, batch: functional(net)(params | frozen, batch),
        ga.InnerSGD(RATE, STEPS),
        first_order=first_order,
    ).step(trained, draw(), ga.GradientAgreement())
    inner = INNER["sgd"](p for p in net.parameters() if p.requires_grad)
    options = {"first_order": first_order, "memory": memory}
    result = loop(net, inner, draw(), ga.GradientAgreement(), **options)
    for name, leaf in expected.update.items():
        assert_near(result.update[name].flatten(), leaf.flatten(), 1e-12)
    assert net[0].weight.grad is None
    assert net.spare.grad is None


def test_tied_parameters_are_one():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1)).double()
    net[2].weight = net[0].weight
    inner = INNER["sgd"](net.parameters())
    displacements, gradients = one_by_one(net, inner, draw(), False)
    loop(net, inner, draw(), ga.GradientAgreement())
    assert_near(grads(net), PAPER.weigh(displacements) @ gradients, 1e-12)


def test_learners_have_their_own_running_statistics():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    before = copy.deepcopy([*net.buffers()])
    inner = INNER["sgd"](net.parameters())
    displacements, gradients = one_by_one(net, inner, draw(), False)
    loop(net, inner, draw(), ga.GradientAgreement())
    assert_near(grads(net), PAPER.weigh(displacements) @ gradients, 1e-12)
    torch.testing.assert_close([*net.buffers()], before, rtol=0, atol=0)


@each_order
def test_stream_holds_one_graph_and_graph_holds_all(first_order):
    """The peak of what graphs hold on to while higher's loop runs."""
    peaks = {}
    for memory in ("graph", "stream"):
        for n in (2, 8):
            net = network()
            inner = INNER["sgd"](net.parameters())
            with saved_bytes() as peak:
                loop(net, inner, draw(n), ga.Mean(), first_order=first_order, memory=memory)
            peaks[memory, n] = peak.most
    assert peaks["stream", 8] == peaks["stream", 2]
    assert peaks["graph", 8] > 3 * peaks["graph", 2]
