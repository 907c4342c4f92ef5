"""plain.train against loops written by hand, and on sine regression."""

import math

import pytest
import torch
from gradagree_opt.adapters import plain
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga
from gradagree_opt.tasks import Sine

from ..meta.loops import ALGORITHMS

INNER = ga.InnerSGD(0.05, 3)
SINE = Sine(amplitude=(0.5, 2.0), phase=(0.0, math.pi / 2), x_range=(-2.0, 2.0), support_shots=10)


def network(seed, hidden=20):
    """1 – hidden – 1, as leaves that an optimizer can hold."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        "weight1": torch.randn(1, hidden, generator=generator),
        "bias1": torch.randn(hidden, generator=generator),
        "weight2": torch.randn(hidden, 1, generator=generator) / math.sqrt(hidden),
        "bias2": torch.zeros(1),
    }
    return {name: p.requires_grad_() for name, p in params.items()}


def loss_fn(params, batch):
    x, y = batch
    hidden = torch.tanh(x @ params["weight1"] + params["bias1"])
    return ((hidden @ params["weight2"] + params["bias2"] - y) ** 2).mean()


def sines(iteration, n=8):
    return SINE.sample(n, generator=torch.Generator().manual_seed(iteration))


def validation_loss(meta, params):
    """Mean query loss after adaptation over a hundred tasks of a seed of their own."""
    tasks = SINE.sample(100, split="validation", generator=torch.Generator().manual_seed(99))
    params = tree_map(torch.Tensor.detach, params)
    adapted = torch.func.vmap(meta.adapt, (None, 0))(params, tasks["support"])
    return torch.func.vmap(loss_fn)(adapted, tasks["query"]).mean().item()


META = {
    "MAML": ga.MAML(loss_fn, INNER),
    "FOMAML": ga.MAML(loss_fn, INNER, first_order=True),
    "Reptile": ga.Reptile(loss_fn, INNER),
}
each_meta = pytest.mark.parametrize("meta", META.values(), ids=META)


def by_hand(name, params, iterations, rate):
    """SGD on the mean over tasks, one task after the other."""
    for iteration in range(iterations):
        tasks = sines(iteration)
        each = [
            ALGORITHMS[name].one_task(
                loss_fn, params, tree_map(lambda leaf, i=index: leaf[i], tasks), 0.05, 3
            )
            for index in range(8)
        ]
        params = {
            key: (p - rate * sum(task.direction[key] for task in each) / 8).detach()
            for key, p in params.items()
        }
    return params


@pytest.mark.parametrize("name", META)
def test_equals_a_loop_written_by_hand(name):
    params = network(0)
    expected = by_hand(name, params, 5, 0.1)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    plain.train(META[name], params, sines, optimizer, ga.Mean(), iterations=5)
    for key, p in params.items():
        torch.testing.assert_close(p, expected[key], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(p, network(0)[key], rtol=1e-3)


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


def run(meta, params):
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.05)
    return plain.train(meta, params, sines, optimizer, ga.GradientAgreement(), iterations=3)


@each_meta
def test_a_parameter_that_no_task_uses_stays_and_changes_nothing_else(meta):
    spare = run(meta, network(0) | {"spare": torch.ones(3, requires_grad=True)})
    assert torch.equal(spare.pop("spare"), torch.ones(3))
    for key, p in run(meta, network(0)).items():
        torch.testing.assert_close(spare[key], p, rtol=1e-6, atol=1e-7)


@each_meta
def test_a_frozen_parameter_is_named(meta):
    params = network(0)
    params["bias1"].requires_grad_(False)
    with pytest.raises(ValueError, match="found 'bias1' frozen; keep it out of params and let"):
        run(meta, params)
    assert torch.equal(params["bias1"], network(0)["bias1"])


@each_meta
def test_a_tied_parameter_is_to_be_given_once(meta):
    params = network(0)
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.05)
    params["tied"] = params["bias1"]
    with pytest.raises(ValueError, match="every parameter once, found 'bias1' again as 'tied'"):
        plain.train(meta, params, sines, optimizer, ga.GradientAgreement(), iterations=3)
    assert torch.equal(params["bias1"], network(0)["bias1"])


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("make", [ga.MAML, ga.Reptile])
def test_running_statistics_are_refused_with_what_to_do(make, chunk_size):
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    def loss_of_net(params, batch):
        return ((torch.func.functional_call(net, params, (batch[0],)) - batch[1]) ** 2).mean()

    meta, params = make(loss_of_net, INNER, chunk_size=chunk_size), dict(net.named_parameters())
    message = r"call torch\.func\.replace_all_batch_norm_modules_\(model\), or"
    with pytest.raises(ValueError, match=message) as caught:
        run(meta, params)
    assert "\n" not in str(caught.value)
    assert not net[1].running_mean.any() and net[1].num_batches_tracked == 0

    torch.func.replace_all_batch_norm_modules_(net)
    before = net[2].weight.detach().clone()
    run(meta, params)
    assert not torch.equal(net[2].weight, before)


@pytest.mark.parametrize(
    ("place", "wrong", "found"),
    [
        (1, torch.nn.Linear(1, 1), r"found Linear; give dict\(module\.named_parameters\(\)\)"),
        (2, {"support": (), "query": ()}, "to its tasks, found dict; give lambda iteration: tasks"),
        (3, torch.optim.LBFGS([torch.ones(1)]), r"found LBFGS, whose step\(\) needs its closure"),
        (
            3,
            ga.TaskOptimizer(torch.optim.SGD([torch.ones(1)]), ga.Mean()),
            r"found TaskOptimizer, whose step\(\) needs its losses",
        ),
    ],
    ids=["module", "tasks", "LBFGS", "TaskOptimizer"],
)
def test_what_is_of_another_kind_is_refused(place, wrong, found, without_type_checks):
    w = torch.ones(1, requires_grad=True)
    maml = ga.MAML(lambda w, x: ((w - x) ** 2).mean(), ga.InnerSGD(lr=0.1, steps=1))
    optimizer = torch.optim.SGD([w], lr=0.1)
    arguments = [maml, w, lambda _: {"support": w[None], "query": w[None]}, optimizer, ga.Mean()]
    arguments[place] = wrong
    with pytest.raises(TypeError, match=found):
        plain.train(*arguments, iterations=1)
    assert w.item() == 1


def test_an_optimizer_over_other_tensors_is_refused():
    params = network(0)
    copies = [p.detach().clone().requires_grad_() for p in params.values()]
    for held in (copies, list(params.values())[:3]):
        optimizer = torch.optim.SGD(held, lr=0.1)
        with pytest.raises(ValueError, match="expected an optimizer over the leaves of params"):
            plain.train(META["MAML"], params, sines, optimizer, ga.Mean(), iterations=1)
    assert all(torch.equal(p, network(0)[key]) for key, p in params.items())


def test_a_refused_batch_leaves_the_parameters_of_the_last_good_step():
    params, expected = network(0), network(0)

    def source(iteration):
        tasks = sines(iteration)
        if iteration == 2:
            tasks["support"][1][3] = float("nan")
        return tasks

    plain.train(
        META["Reptile"],
        expected,
        sines,
        torch.optim.SGD(expected.values(), lr=0.1),
        ga.GradientAgreement(),
        iterations=2,
    )
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[3\]"):
        plain.train(
            META["Reptile"], params, source, optimizer, ga.GradientAgreement(), iterations=5
        )
    assert all(torch.equal(params[key], expected[key]) for key in params)
