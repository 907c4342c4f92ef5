"""learn2learn's algorithms on all tasks at once."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga
from gradagree_testing.configurations import METHODS

l2l = pytest.importorskip("learn2learn", reason="learn2learn is not installed")

from gradagree_opt.adapters.learn2learn import meta_step  # noqa: E402

from .learn2learn_cases import ALGORITHMS, CASES, adapted, loop, one_by_one  # noqa: E402
from .learners import (  # noqa: E402
    RATE,
    STEPS,
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
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])
AGGREGATORS = {
    "paper": ga.GradientAgreement(),
    "mean": ga.Mean(),
    "leaf": ga.GradientAgreement(scope="leaf"),
    "matched": ga.GradientAgreement(match_norm="mean"),
    "drop": ga.GradientAgreement(nonfinite="drop"),
}


class Anil(nn.Module):
    """A trained body that does not adapt under a head that does."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.head(self.body(x))

    def clone(self):
        return Anil(self.body, self.head.clone())

    def adapt(self, loss):
        self.head.adapt(loss)


def anil():
    return Anil(network()[:2], l2l.algorithms.MAML(network()[2], lr=RATE))


@each_algorithm
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_equals_the_formulas_on_tasks_taken_one_by_one(name, first_order, method):
    algorithm, tasks = ALGORITHMS[name](network(), first_order), draw()
    displacements, gradients = one_by_one(algorithm, tasks)
    weights = method.weigh_adapted(displacements, gradients)
    result = meta_step(algorithm, mse, tasks, method.make(), steps=STEPS)
    assert_near(result.weights, weights, 1e-12)
    assert_near(grads(algorithm), weights @ gradients, 1e-12)


@each_algorithm
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_step_equals_the_loop(name, first_order, aggregator):
    looped, stepped = (ALGORITHMS[name](network(), first_order) for _ in range(2))
    expected = loop(looped, draw(), AGGREGATORS[aggregator])
    result = meta_step(stepped, mse, draw(), AGGREGATORS[aggregator], steps=STEPS)
    assert_near(grads(stepped), grads(looped), 1e-12)
    assert_near(vector(result.update.values()), vector(expected.update.values()), 1e-12)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-11, atol=1e-14)


@each_dtype
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_maml_equals_the_pure_function(dtype, first_order):
    net, tasks = network(dtype), draw(dtype=dtype)
    pure = ga.MAML(functional(net), ga.InnerSGD(RATE, STEPS), first_order=first_order)
    expected = pure.step(detached(net), tasks, ga.GradientAgreement())
    maml = l2l.algorithms.MAML(net, lr=RATE, first_order=first_order)
    result = meta_step(maml, mse, tasks, ga.GradientAgreement(), steps=STEPS)
    assert_near(grads(maml), vector(expected.update.values()), TOLERANCES[dtype])
    torch.testing.assert_close(result.losses, expected.losses)


def test_losses_are_those_after_adaptation():
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    result = meta_step(maml, mse, draw(), ga.GradientAgreement(), steps=2)
    expected = [mse(adapted(maml, task, 2), task["query"]).detach() for task in each(draw())]
    torch.testing.assert_close(result.losses, torch.stack(expected))
    assert not result.losses.requires_grad


def test_a_step_adds_to_grad_and_keeps_the_modules_own_parameters():
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    before = [*maml.parameters()]
    meta_step(maml, mse, draw(), ga.Mean())
    once = grads(maml)
    meta_step(maml, mse, draw(), ga.Mean())
    assert_near(grads(maml), 2 * once, 1e-12)
    assert all(p is q for p, q in zip(before, maml.parameters(), strict=True))


def test_chunks_of_tasks_change_nothing():
    whole, chunked = (l2l.algorithms.MAML(network(), lr=RATE) for _ in range(2))
    meta_step(whole, mse, draw(), ga.GradientAgreement())
    meta_step(chunked, mse, draw(), ga.GradientAgreement(), chunk_size=3)
    assert_near(grads(chunked), grads(whole), 1e-12)


def test_any_module_with_clone_and_adapt_is_an_algorithm():
    looped, stepped = anil(), anil()
    loop(looped, draw(), ga.GradientAgreement())
    meta_step(stepped, mse, draw(), ga.GradientAgreement(), steps=STEPS)
    assert grads(looped.body).norm() > 0
    assert_near(grads(stepped), grads(looped), 1e-12)


def test_every_task_draws_its_own_dropout_mask():
    dropout = nn.Sequential(nn.Dropout(0.5), network())
    same = {part: tuple(t[:1].expand(4, *t.shape[1:]) for t in b) for part, b in draw().items()}
    result = meta_step(l2l.algorithms.MAML(dropout, lr=RATE), mse, same, ga.Mean())
    assert result.losses.unique().numel() == 4


def images(n=3, classes=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, n, 2 * classes, 1, 28, 28, generator=generator, dtype=torch.float64)
    y = torch.arange(classes).repeat(n, 2)
    return {"support": (x[0], y), "query": (x[1], y)}


def cross_entropy(learner, batch):
    return nn.functional.cross_entropy(learner(batch[0]), batch[1])


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_running_statistics_end_as_after_the_loop(momentum):
    """learn2learn's own network, whose BatchNorm layers have two names each."""
    torch.manual_seed(0)
    net = l2l.vision.models.OmniglotCNN(5, hidden_size=2).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    looped, stepped = (l2l.algorithms.MAML(copy.deepcopy(net), lr=RATE) for _ in range(2))
    for _ in range(2):
        batch = ga.TaskBatch(looped, ga.GradientAgreement())
        for task in each(images()):
            learner = looped.clone()
            learner.adapt(cross_entropy(learner, task["support"]))
            batch.add(cross_entropy(learner, task["query"]), adapted=learner)
        batch.backward()
        meta_step(stepped, cross_entropy, images(), ga.GradientAgreement())
    assert_near(grads(stepped), grads(looped), 1e-12)
    buffers = dict(looped.named_buffers())
    assert buffers["module.base.0.normalize.num_batches_tracked"] == 12
    for name, buffer in stepped.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-12, atol=1e-14)


def test_batch_norm_in_evaluation_mode_changes_no_statistics():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().eval()
    before = copy.deepcopy([*net.buffers()])
    meta_step(l2l.algorithms.MAML(net, lr=RATE), mse, draw(), ga.Mean())
    torch.testing.assert_close([*net.buffers()], before, rtol=0, atol=0)


def test_frozen_and_unused_parameters_that_are_allowed_change_nothing():
    plain, spare = network(), network()
    spare.register_parameter("spare", nn.Parameter(torch.ones(2).double()))
    results = []
    for net in (plain, spare):
        net[0].requires_grad_(False)
        maml = l2l.algorithms.MAML(net, lr=RATE, allow_nograd=True)  # allows unused ones too
        results.append(meta_step(maml, mse, draw(), ga.GradientAgreement()))
    torch.testing.assert_close(results[0].weights, results[1].weights, rtol=1e-12, atol=0)
    for name, leaf in results[0].update.items():
        torch.testing.assert_close(results[1].update[name], leaf, rtol=1e-12, atol=0)
    assert not results[1].update["module.spare"].any()
    assert spare[0].weight.grad is None


class Spare(nn.Module):
    """A network with a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.net, self.spare = network(), nn.Parameter(torch.ones(2).double())

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("aggregator", [ga.GradientAgreement(), ga.EqualAgreement()], ids=repr)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["MAML", "GBML"])
def test_grad_is_none_where_a_loop_leaves_none(name, first_order, aggregator):
    looped, stepped = (ALGORITHMS[name](Spare(), first_order, allow_unused=True) for _ in range(2))
    loop(looped, draw(), aggregator)
    meta_step(stepped, mse, draw(), aggregator, steps=STEPS)
    assert_near(grads(stepped), grads(looped), 1e-12)
    found, expected = (
        [name for name, p in algorithm.named_parameters() if p.grad is None]
        for algorithm in (stepped, looped)
    )
    assert "module.spare" in expected and found == expected


def test_displacements_are_taken_where_the_weights_read_them(monkeypatch):
    def none_of_them(*_):
        raise AssertionError("taken")

    monkeypatch.setattr("gradagree_opt.adapters.learn2learn.displacement", none_of_them)
    maml = l2l.algorithms.MAML(network(), lr=RATE)
    meta_step(maml, mse, draw(), ga.EqualAgreement())
    with pytest.raises(AssertionError, match="taken"):
        meta_step(maml, mse, draw(), ga.GradientAgreement())
