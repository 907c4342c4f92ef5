"""TaskBatch in loops over learn2learn's learners."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga
from gradagree_testing.configurations import METHODS, PAPER
from gradagree_testing.memory import saved_bytes

l2l = pytest.importorskip("learn2learn", reason="learn2learn is not installed")

from .learn2learn_cases import ALGORITHMS, CASES, adapted, loop, one_by_one  # noqa: E402
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

each_algorithm = pytest.mark.parametrize(("name", "first_order"), CASES)
each_order = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])


@each_order
@each_memory
@each_dtype
@pytest.mark.parametrize("aggregator", [ga.GradientAgreement(), ga.Mean()], ids=["ga", "mean"])
def test_maml_equals_the_pure_function(first_order, memory, dtype, aggregator):
    net, tasks = network(dtype), draw(dtype=dtype)
    expected = ga.MAML(functional(net), ga.InnerSGD(RATE, STEPS), first_order=first_order).step(
        detached(net), tasks, aggregator
    )
    maml = l2l.algorithms.MAML(net, lr=RATE, first_order=first_order)
    result = loop(maml, tasks, aggregator, memory=memory)
    assert_near(grads(maml), vector(expected.update.values()), TOLERANCES[dtype])
    torch.testing.assert_close(result.weights, expected.weights)


@each_order
@each_memory
@each_dtype
def test_meta_sgd_equals_the_pure_function_in_parameters_and_rates(first_order, memory, dtype):
    net, tasks = network(dtype), draw(dtype=dtype)
    params = detached(net)
    meta = {"params": params, "lr": {name: torch.full_like(p, RATE) for name, p in params.items()}}
    expected = ga.MetaSGD(functional(net), STEPS, first_order=first_order).step(
        meta, tasks, ga.GradientAgreement()
    )
    algorithm = l2l.algorithms.MetaSGD(net, lr=RATE, first_order=first_order)
    loop(algorithm, tasks, ga.GradientAgreement(), memory=memory)
    update = [*expected.update["params"].values(), *expected.update["lr"].values()]
    assert_near(grads(algorithm), vector(update), TOLERANCES[dtype])


@each_algorithm
@each_memory
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_algorithm_equals_the_formulas_on_tasks_taken_one_by_one(
    name, first_order, memory, method
):
    algorithm, tasks = ALGORITHMS[name](network(), first_order), draw()
    displacements, gradients = one_by_one(algorithm, tasks)
    weights = method.weigh_adapted(displacements, gradients)
    result = loop(algorithm, tasks, method.make(), memory=memory)
    assert_near(result.weights, weights, 1e-12)
    assert_near(grads(algorithm), weights @ gradients, 1e-12)


@each_algorithm
def test_the_mean_equals_learn2learns_own_loop(name, first_order):
    ours, theirs = (ALGORITHMS[name](network(), first_order) for _ in range(2))
    loop(ours, draw(), ga.Mean())
    for task in each(draw()):
        mse(adapted(theirs, task), task["query"]).backward()
    for p in theirs.parameters():
        p.grad.mul_(1 / TASKS)
    assert_near(grads(ours), grads(theirs), 1e-12)


@pytest.mark.parametrize("name", ["MetaSGD", "GBML", "Kronecker"])
def test_meta_parameters_that_do_not_adapt_have_no_part_in_the_signal(name):
    algorithm, tasks = ALGORITHMS[name](network(), False), draw()
    whole, _ = one_by_one(algorithm, tasks)
    module, _ = one_by_one(algorithm, tasks, learned=nn.ModuleDict({"module": algorithm.module}))
    result = loop(algorithm, tasks, ga.GradientAgreement())
    assert whole.shape[1] > module.shape[1]
    assert_near(result.weights, PAPER.weigh(module), 1e-12)


def test_an_adapted_transform_has_its_part_in_the_signal():
    algorithm, tasks = ALGORITHMS["GBML adapting"](network(), False), draw()
    module, _ = one_by_one(algorithm, tasks, learned=nn.ModuleDict({"module": algorithm.module}))
    result = loop(algorithm, tasks, ga.GradientAgreement())
    assert (result.weights - PAPER.weigh(module)).abs().max() > 1e-6


@each_memory
def test_the_body_of_anil_is_trained_and_does_not_adapt(memory):
    body, head = network()[:2], l2l.algorithms.MAML(network()[2], lr=RATE)
    parameters = [*body.parameters(), *head.parameters()]
    batch = ga.TaskBatch(parameters, ga.GradientAgreement(), memory=memory)
    displacements, gradients = [], []
    for task in each(draw()):
        (x, y), query = task["support"], task["query"]
        learner = head.clone()
        for _ in range(STEPS):
            learner.adapt(((learner(body(x)) - y) ** 2).mean())
        loss = mse(nn.Sequential(body, learner), query)
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        gradients.append(vector(found))
        displacements.append(vector(head.parameters()) - vector(learner.parameters()))
        batch.add(loss, adapted=[*body.parameters(), *learner.parameters()])
    result = batch.backward()
    weights = PAPER.weigh(torch.stack(displacements))
    assert_near(result.weights, weights, 1e-12)
    assert_near(vector(p.grad for p in parameters), weights @ torch.stack(gradients), 1e-12)


def test_reptile_with_deep_copies_equals_the_pure_function():
    net, tasks = network(), draw()
    reptile = ga.Reptile(functional(net), ga.InnerSGD(RATE, STEPS))
    expected = reptile.step(detached(net), tasks, ga.GradientAgreement())
    batch = ga.TaskBatch(net, ga.GradientAgreement())
    for task in each(tasks):
        learner = copy.deepcopy(net)
        inner = torch.optim.SGD(learner.parameters(), lr=RATE)
        for _ in range(STEPS):
            inner.zero_grad()
            mse(learner, task["support"]).backward()
            inner.step()
        batch.add(adapted=learner)
    batch.backward()
    assert_near(grads(net), vector(expected.update.values()), 1e-12)


@pytest.mark.parametrize("wrap", [True, False], ids=["algorithm", "network"])
def test_the_batch_takes_the_algorithm_or_the_network_in_it(wrap):
    net, tasks = network(), draw()
    maml = l2l.algorithms.MAML(net, lr=RATE)
    batch = ga.TaskBatch(maml if wrap else net, ga.GradientAgreement())
    for task in each(tasks):
        learner = adapted(maml, task)
        batch.add(mse(learner, task["query"]), adapted=learner)
    batch.backward()
    expected = ga.MAML(functional(net), ga.InnerSGD(RATE, STEPS)).step(
        detached(net), tasks, ga.GradientAgreement()
    )
    assert_near(grads(net), vector(expected.update.values()), 1e-12)


@each_memory
def test_a_frozen_parameter_is_left_alone(memory):
    net, tasks = network(), draw()
    net[0].requires_grad_(False)
    frozen = {name: p for name, p in net.named_parameters() if not p.requires_grad}
    trained = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    expected = ga.MAML(
        lambda params, batch: functional(net)(params | frozen, batch), ga.InnerSGD(RATE, STEPS)
    ).step(trained, tasks, ga.GradientAgreement())
    maml = l2l.algorithms.MAML(net, lr=RATE, allow_nograd=True)
    result = loop(maml, tasks, ga.GradientAgreement(), memory=memory)
    assert_near(vector(result.update.values()), vector(expected.update.values()), 1e-12)
    assert net[0].weight.grad is None


@each_memory
def test_a_parameter_that_no_task_uses_changes_nothing(memory):
    plain, spare = network(), network()
    spare.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    expected = loop(
        l2l.algorithms.MAML(plain, lr=RATE), draw(), ga.GradientAgreement(), memory=memory
    )
    maml = l2l.algorithms.MAML(spare, lr=RATE, allow_unused=True)
    result = loop(maml, draw(), ga.GradientAgreement(), memory=memory)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-12, atol=0)
    assert spare.spare.grad is None
    assert_near(grads(spare)[2:], grads(plain), 1e-12)


@pytest.mark.parametrize("first_order", [False, True])
def test_stream_holds_one_graph_and_graph_holds_all(first_order):
    """The peak of what graphs hold on to while learn2learn's loop runs."""
    peaks = {}
    for memory in ("graph", "stream"):
        for n in (2, 8):
            maml = l2l.algorithms.MAML(network(), lr=RATE, first_order=first_order)
            with saved_bytes() as peak:
                loop(maml, draw(n), ga.GradientAgreement(), memory=memory)
            peaks[memory, n] = peak.most
    assert peaks["stream", 8] == peaks["stream", 2]
    assert peaks["graph", 8] > 3 * peaks["graph", 2]
