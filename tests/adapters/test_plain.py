"""plain.train against loops written by hand, and on sine regression."""

import pytest
import torch
from gradagree_opt.adapters import plain
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga

from ..meta.loops import ALGORITHMS
from ..meta.rules import EQUAL, MEAN, PAPER
from .plain_cases import META, SINE, each_meta, loss_fn, network, run, sines


def validation_loss(meta, params):
    """Mean query loss after adaptation over a hundred tasks of a seed of their own."""
    tasks = SINE.sample(100, split="validation", generator=torch.Generator().manual_seed(99))
    params = tree_map(torch.Tensor.detach, params)
    adapted = torch.func.vmap(meta.adapt, (None, 0))(params, tasks["support"])
    return torch.func.vmap(loss_fn)(adapted, tasks["query"]).mean().item()


def by_hand(name, rule, params, source, iterations, rate):
    """SGD on what a rule makes of the tasks, one task after the other."""
    for iteration in range(iterations):
        tasks = source(iteration)
        each = [tree_map(lambda leaf, i=index: leaf[i], tasks) for index in range(8)]
        signals, directions, _ = ALGORITHMS[name].tasks(loss_fn, params, each, 0.05, 3)
        update = rule.combine(signals, directions)
        params = {key: (p - rate * update[key]).detach() for key, p in params.items()}
    return params


@pytest.mark.parametrize("name", META)
@pytest.mark.parametrize("rule", [MEAN, PAPER, EQUAL], ids=["mean", "agreement", "equal"])
def test_equals_a_loop_written_by_hand(name, rule):
    params = {key: p.detach().double().requires_grad_() for key, p in network(0).items()}
    source = lambda iteration: tree_map(torch.Tensor.double, sines(iteration))  # noqa: E731
    on_gradients = rule is EQUAL and name != "Reptile"
    by = f"{name} on gradients" if on_gradients else name
    expected = by_hand(by, rule, params, source, 5, 0.1)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    plain.train(META[name], params, source, optimizer, rule.aggregator, iterations=5)
    for key, p in params.items():
        torch.testing.assert_close(p, expected[key], rtol=1e-9, atol=1e-11)
        assert not torch.allclose(p, network(0)[key].double(), rtol=1e-3)


@each_meta
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_equals_steps_of_the_meta_algorithm_and_the_optimizer(meta, make):
    trained, expected = network(1), network(1)
    optimizer = make(trained.values(), lr=0.01)
    reference = make(expected.values(), lr=0.01)
    plain.train(meta, trained, sines, optimizer, ga.GradientAgreement(), iterations=5)
    for iteration in range(5):
        params = {key: p.detach() for key, p in expected.items()}
        update = meta.step(params, sines(iteration), ga.GradientAgreement()).update
        for key, p in expected.items():
            p.grad = update[key]
        reference.step()
    assert all(torch.equal(trained[key], expected[key]) for key in trained)


@each_meta
@pytest.mark.parametrize(
    "aggregator", [ga.Mean(), ga.GradientAgreement()], ids=["mean", "agreement"]
)
@pytest.mark.parametrize("seed", range(3))
def test_learns_to_adapt_to_sines(meta, aggregator, seed):
    params = network(seed)
    before = validation_loss(meta, params)
    optimizer = torch.optim.Adam(params.values(), lr=0.02)
    plain.train(
        meta, params, lambda i: sines(1000 * seed + i), optimizer, aggregator, iterations=40
    )
    assert validation_loss(meta, params) < 0.7 * before


def test_meta_sgd_trains_the_rates_with_the_parameters():
    params = network(0)
    rates = {key: torch.full_like(p, 0.01).requires_grad_() for key, p in params.items()}
    meta_params = {"params": params, "lr": rates}
    before = tree_map(lambda p: p.detach().clone(), meta_params)
    meta = ga.MetaSGD(loss_fn, 1)
    loss = validation_loss(meta, meta_params)
    optimizer = torch.optim.Adam(tree_leaves(meta_params), lr=0.01)
    result = plain.train(meta, meta_params, sines, optimizer, ga.GradientAgreement(), iterations=40)
    assert result is meta_params
    pairs = zip(tree_leaves(before), tree_leaves(meta_params), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)
    assert validation_loss(meta, meta_params) < 0.9 * loss


def test_returns_the_same_tensors():
    params = network(0)
    leaves = list(params.values())
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    result = plain.train(META["MAML"], params, sines, optimizer, ga.Mean(), iterations=1)
    assert result is params
    assert all(a is b for a, b in zip(result.values(), leaves, strict=True))
    assert all(p.requires_grad and p.is_leaf for p in leaves)


def test_no_iterations_leave_the_parameters():
    params = network(0)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    plain.train(META["MAML"], params, sines, optimizer, ga.Mean(), iterations=0)
    assert all(torch.equal(p, network(0)[key]) for key, p in params.items())


def test_tasks_are_asked_for_by_iteration_and_the_callback_sees_every_step():
    params, asked, seen = network(0), [], []
    optimizer = torch.optim.SGD(params.values(), lr=0.1)

    def source(iteration):
        asked.append(iteration)
        return sines(iteration)

    def callback(iteration, step):
        seen.append((iteration, step.losses.shape, step.weights.sum().item()))

    plain.train(META["MAML"], params, source, optimizer, ga.Mean(), iterations=3, callback=callback)
    assert asked == [0, 1, 2]
    assert seen == [(i, (8,), pytest.approx(1)) for i in range(3)]


def test_the_callback_comes_after_the_outer_step_and_stops_by_true():
    params, stopped = network(0), network(0)
    parameters_seen = []

    def callback(iteration, step):
        parameters_seen.append(stopped["weight1"].detach().clone())
        return iteration == 1

    for these, length, call in ((params, 2, None), (stopped, 10, callback)):
        optimizer = torch.optim.SGD(these.values(), lr=0.1)
        plain.train(
            META["MAML"], these, sines, optimizer, ga.Mean(), iterations=length, callback=call
        )
    assert len(parameters_seen) == 2
    assert not torch.equal(parameters_seen[0], network(0)["weight1"])
    assert torch.equal(parameters_seen[1], stopped["weight1"])
    assert all(torch.equal(params[key], stopped[key]) for key in params)


def test_a_scheduler_steps_in_the_callback():
    scheduled, reference = network(0), network(0)
    optimizer = torch.optim.SGD(scheduled.values(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / 4)
    rates = []

    def callback(iteration, step):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()

    plain.train(
        META["MAML"], scheduled, sines, optimizer, ga.Mean(), iterations=4, callback=callback
    )
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
    for iteration, rate in enumerate(rates):
        params = {key: p.detach() for key, p in reference.items()}
        update = META["MAML"].step(params, sines(iteration), ga.Mean()).update
        reference = {key: p - rate * update[key] for key, p in params.items()}
    for key, p in scheduled.items():
        torch.testing.assert_close(p, reference[key], rtol=1e-6, atol=1e-7)


@each_meta
def test_a_parameter_that_no_task_uses_stays_and_changes_nothing_else(meta):
    spare = run(meta, network(0) | {"spare": torch.ones(3, requires_grad=True)})
    assert torch.equal(spare.pop("spare"), torch.ones(3))
    for key, p in run(meta, network(0)).items():
        torch.testing.assert_close(spare[key], p, rtol=1e-6, atol=1e-7)
