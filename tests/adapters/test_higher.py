"""Gradient Agreement in higher's inner loops, and its loop over a meta-batch."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga
from gradagree_testing.memory import saved_bytes

higher = pytest.importorskip("higher", reason="higher is not installed")

from gradagree_opt.adapters.higher import meta_step  # noqa: E402

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
    paper_weights,
    vector,
)

each_order = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])
INNER = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
}


def adapted(net, inner, task, first_order, **options):
    """A functional module after its inner steps."""
    options = {"copy_initial_weights": False} | options
    with higher.innerloop_ctx(net, inner, track_higher_grads=not first_order, **options) as (
        learner,
        steps,
    ):
        for _ in range(STEPS):
            steps.step(mse(learner, task["support"]))
    return learner


def loop(net, inner, tasks, aggregator, *, first_order=False, memory="graph"):
    batch = ga.TaskBatch(net, aggregator, memory=memory)
    for task in each(tasks):
        learner = adapted(net, inner, task, first_order)
        batch.add(mse(learner, task["query"]), adapted=learner)
    return batch.backward()


def one_by_one(net, inner, tasks, first_order):
    """Displacement and gradient of one task after the other, the way higher's users take them."""
    displacements, gradients = [], []
    for task in each(tasks):
        learner = adapted(net, inner, task, first_order)
        at = [*learner.parameters()] if first_order else [*net.parameters()]
        gradients.append(vector(torch.autograd.grad(mse(learner, task["query"]), at)))
        displacements.append(vector(net.parameters()) - vector(learner.parameters()))
    return displacements, gradients


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
def test_every_optimizer_equals_the_formulas_on_tasks_taken_one_by_one(
    optimizer, first_order, memory
):
    net, tasks = network(), draw()
    inner = INNER[optimizer](net.parameters())
    displacements, gradients = one_by_one(net, inner, tasks, first_order)
    weights = paper_weights(displacements)
    aggregator = ga.GradientAgreement()
    result = loop(net, inner, tasks, aggregator, first_order=first_order, memory=memory)
    assert_near(result.weights, weights, 1e-12)
    assert_near(grads(net), weights @ torch.stack(gradients), 1e-12)


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


def test_a_frozen_parameter_that_higher_would_adapt(net):
    net[0].weight.requires_grad_(False)
    inner = INNER["sgd"](net.parameters())
    call = lambda: meta_step(net, inner, mse, draw(), ga.Mean(), first_order=True)  # noqa: E731
    refuses(call, "found '0.weight' frozen, which higher adapts")
    meta_step(net, inner, mse, draw(), ga.Mean())
    assert net[0].weight.grad is None


def test_an_inner_optimizer_of_another_model(net):
    inner = INNER["sgd"](copy.deepcopy(net).parameters())
    call = lambda: meta_step(net, inner, mse, draw(), ga.Mean())  # noqa: E731
    refuses(call, r"found one that holds others; build it as torch\.optim\.SGD")


def test_tied_parameters_are_one():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1)).double()
    net[2].weight = net[0].weight
    inner = INNER["sgd"](net.parameters())
    displacements, gradients = one_by_one(net, inner, draw(), False)
    weights = paper_weights(displacements)
    loop(net, inner, draw(), ga.GradientAgreement())
    assert_near(grads(net), weights @ torch.stack(gradients), 1e-12)


def test_learners_have_their_own_running_statistics():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    before = copy.deepcopy([*net.buffers()])
    inner = INNER["sgd"](net.parameters())
    displacements, gradients = one_by_one(net, inner, draw(), False)
    loop(net, inner, draw(), ga.GradientAgreement())
    assert_near(grads(net), paper_weights(displacements) @ torch.stack(gradients), 1e-12)
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


@pytest.fixture
def net():
    return network()


def refuses(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_no_inner_step_and_a_loss_that_is_no_scalar(net):
    inner = INNER["sgd"](net.parameters())
    refuses(lambda: meta_step(net, inner, mse, draw(), ga.Mean(), steps=0), "1 or more, found 0")
    vectors = lambda learner, batch: (learner(batch[0]) - batch[1]).square()  # noqa: E731
    refuses(lambda: meta_step(net, inner, vectors, draw(), ga.Mean()), "return a scalar tensor")


def test_a_loss_that_does_not_depend_on_the_learner(net):
    inner = INNER["sgd"](net.parameters())

    def constant(learner, batch):
        return batch[0].square().mean()

    refuses(
        lambda: meta_step(net, inner, constant, draw(), ga.Mean()),
        "found one for task 0 that depends on none of them; compute it by the learner",
    )
    assert all(p.grad is None for p in net.parameters())


def test_the_model_and_the_optimizer_in_each_others_place(net, without_type_checks):
    inner = INNER["sgd"](net.parameters())
    with pytest.raises(TypeError, match=r"found SGD and Sequential; call meta_step\(model, opt"):
        meta_step(inner, net, mse, draw(), ga.Mean())


@each_memory
def test_copied_initial_weights(net, memory):
    batch, task = ga.TaskBatch(net, ga.GradientAgreement(), memory=memory), each(draw())[0]
    learner = adapted(net, INNER["sgd"](net.parameters()), task, False, copy_initial_weights=True)
    loss = mse(learner, task["query"])
    refuses(lambda: batch.add(loss, adapted=learner), "with copy_initial_weights=False in higher")
    assert len(batch) == 0


def test_copied_initial_weights_are_right_in_first_order(net):
    task = each(draw())[0]
    results = []
    for copied in (False, True):
        batch = ga.TaskBatch(net, ga.GradientAgreement())
        learner = adapted(
            net, INNER["sgd"](net.parameters()), task, True, copy_initial_weights=copied
        )
        batch.add(mse(learner, task["query"]), adapted=learner)
        results.append(vector(batch.backward().update.values()))
    assert torch.equal(*results)


@each_memory
def test_the_learner_of_another_model(net, memory):
    other, task = network(), each(draw())[0]
    batch = ga.TaskBatch(net, ga.GradientAgreement(), memory=memory)
    learner = adapted(other, INNER["sgd"](other.parameters()), task, False)
    loss = mse(learner, task["query"])
    refuses(lambda: batch.add(loss, adapted=learner), "expected a loss that depends on the param")
    wide = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    learner = adapted(wide, INNER["sgd"](wide.parameters()), task, True)
    loss = mse(learner, task["query"])
    refuses(lambda: batch.add(loss, adapted=learner), r"found \[9, 3\] for '0.weight'")


@each_order
def test_the_learner_of_another_task(net, first_order):
    batch, tasks = ga.TaskBatch(net, ga.GradientAgreement()), each(draw())
    inner = INNER["sgd"](net.parameters())
    first, second = (adapted(net, inner, task, first_order) for task in tasks[:2])
    loss = mse(first, tasks[0]["query"])
    refuses(lambda: batch.add(loss, adapted=second), "add every loss with its own learner")


@each_order
def test_a_loss_that_has_had_its_own_backward(net, first_order):
    batch, task = ga.TaskBatch(net, ga.GradientAgreement()), each(draw())[0]
    learner = adapted(net, INNER["sgd"](net.parameters()), task, first_order)
    loss = mse(learner, task["query"])
    loss.backward()
    net.zero_grad()
    batch.add(loss, adapted=learner)
    refuses(batch.backward, "one that a backward pass has freed")
    assert all(p.grad is None for p in net.parameters())
