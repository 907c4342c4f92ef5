"""TaskOptimizer against loss.backward() of the mean, and against the pure functions."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import gradagree_opt as ga
from gradagree_testing.configurations import METHODS

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD with momentum and decay": partial(
        torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01
    ),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class MultiTask(nn.Module):
    """A shared encoder and one head a task."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))

    def forward(self, x):
        shared = self.encoder(x)
        return [head(shared) for head in self.heads]


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiTask().double()


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return x, [x.sum(1, keepdim=True).sin() + task for task in range(3)]


def losses_of(model, batch):
    x, targets = batch
    return [mse_loss(y, target) for y, target in zip(model(x), targets, strict=True)]


def assert_equal_models(first, second, rtol=1e-12):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14)


@each_optimizer
@pytest.mark.parametrize("stacked", [True, False], ids=["vector", "sequence"])
def test_mean_is_the_step_on_the_mean_loss(model, make, stacked):
    ours, plain = model, copy.deepcopy(model)
    optimizer, reference = make(ours.parameters()), make(plain.parameters())
    tasks = ga.TaskOptimizer(optimizer, ga.Mean())
    for iteration in range(4):
        tasks.zero_grad()
        losses = losses_of(ours, draw(iteration))
        tasks.step(torch.stack(losses) if stacked else losses)
        reference.zero_grad()
        torch.stack(losses_of(plain, draw(iteration))).mean().backward()
        reference.step()
        assert_equal_models(ours, plain)


@each_optimizer
def test_mean_is_the_step_on_the_mean_loss_where_no_task_uses_a_parameter(model, make):
    """Weight decay and momentum pass over a parameter without a gradient."""
    ours, plain = model, copy.deepcopy(model)
    optimizer, reference = make(ours.parameters()), make(plain.parameters())
    tasks = ga.TaskOptimizer(optimizer, ga.Mean())
    for iteration in range(2):
        tasks.zero_grad()
        tasks.step(losses_of(ours, draw(iteration))[:2])
        reference.zero_grad()
        torch.stack(losses_of(plain, draw(iteration))[:2]).mean().backward()
        reference.step()
    assert_equal_models(ours, plain)


@each_optimizer
@pytest.mark.parametrize(
    "aggregator",
    [
        ga.GradientAgreement,
        partial(ga.GradientAgreement, match_norm="mean", negative="clip"),
        partial(ga.GradientAgreement, scope="leaf"),
        lambda: ga.RandomWeights(torch.Generator().manual_seed(1)),
    ],
    ids=["agreement", "clip", "leaf", "random"],
)
def test_step_is_that_of_the_aggregated_gradients(model, make, aggregator):
    ours, functional = model, copy.deepcopy(model)
    optimizer, reference = make(ours.parameters()), make(functional.parameters())
    first, second = aggregator(), aggregator()
    tasks = ga.TaskOptimizer(optimizer, first)

    def loss_fn(params, task):
        x, target, which = task
        outputs = torch.stack(functional_call(functional, params, (x,)))
        return mse_loss((outputs * which.reshape(3, 1, 1)).sum(0), target)

    for iteration in range(3):
        tasks.zero_grad()
        x, targets = draw(iteration)
        result = tasks.step(losses_of(ours, (x, targets)))
        params = {name: p.detach() for name, p in functional.named_parameters()}
        stack = x.expand(3, *x.shape), torch.stack(targets), torch.eye(3, dtype=x.dtype)
        expected = ga.aggregate_gradients(loss_fn, params, stack, second)
        for name, p in functional.named_parameters():
            p.grad = expected.update[name]
        reference.step()
        assert_equal_models(ours, functional, rtol=1e-9)
        torch.testing.assert_close(result.weights, expected.weights, rtol=1e-10, atol=1e-13)
        updates = zip(result.update.values(), expected.update.values(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-13) for a, b in updates)


@each_optimizer
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_step_is_that_of_the_gradients_with_the_weights_of_the_formulas(model, make, method):
    ours, plain = model, copy.deepcopy(model)
    optimizer, reference = make(ours.parameters()), make(plain.parameters())
    tasks, leaves = ga.TaskOptimizer(optimizer, method.make()), [*plain.parameters()]
    gradients = partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
    for iteration in range(3):
        tasks.zero_grad()
        tasks.step(losses_of(ours, draw(iteration)))
        each = [gradients(loss, leaves) for loss in losses_of(plain, draw(iteration))]
        stacks = [torch.stack(rows) for rows in zip(*each, strict=True)]
        for p, update in zip(leaves, method.combine(stacks), strict=True):
            p.grad = update
        reference.step()
        assert_equal_models(ours, plain, rtol=1e-9)


def test_parameter_groups_keep_their_options(model):
    ours, plain = model, copy.deepcopy(model)

    def groups(m):
        return [
            {"params": m.encoder.parameters(), "lr": 0.2},
            {"params": m.heads.parameters(), "weight_decay": 0.1},
        ]

    optimizer, reference = (torch.optim.SGD(groups(m), lr=0.05) for m in (ours, plain))
    tasks = ga.TaskOptimizer(optimizer, ga.Mean())
    assert [group["lr"] for group in tasks.param_groups] == [0.2, 0.05]
    assert tasks.param_groups is optimizer.param_groups
    tasks.step(losses_of(ours, draw(0)))
    torch.stack(losses_of(plain, draw(0))).mean().backward()
    reference.step()
    assert_equal_models(ours, plain)


def test_grads_already_there_are_added_to(model):
    ours, plain = model, copy.deepcopy(model)
    optimizer, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, plain))
    for m in (ours, plain):
        losses_of(m, draw(9))[0].backward()
    ga.TaskOptimizer(optimizer, ga.Mean()).step(losses_of(ours, draw(0)))
    torch.stack(losses_of(plain, draw(0))).mean().backward()
    reference.step()
    assert_equal_models(ours, plain)


def test_frozen_parameters_stay(model):
    model.encoder.requires_grad_(False)
    before = copy.deepcopy(model.encoder.state_dict())
    heads = copy.deepcopy(model.heads.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    ga.TaskOptimizer(optimizer, ga.GradientAgreement()).step(losses_of(model, draw(0)))
    after = model.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(heads["0.weight"], model.heads[0].weight)


def test_zero_grad_is_that_of_the_optimizer(model):
    tasks = ga.TaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ga.Mean())
    tasks.step(losses_of(model, draw(0)))
    tasks.zero_grad(set_to_none=False)
    assert all(p.grad.eq(0).all() for p in model.parameters())
    tasks.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_state_dict_goes_round_and_training_goes_on_as_before(model):
    def fresh(m):
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        return ga.TaskOptimizer(optimizer, ga.GradientAgreement())

    def train(tasks, m, seeds):
        for seed in seeds:
            tasks.zero_grad()
            tasks.step(losses_of(m, draw(seed)))

    tasks = fresh(model)
    train(tasks, model, range(3))
    resumed_model = copy.deepcopy(model)
    resumed = fresh(resumed_model)
    resumed.load_state_dict(copy.deepcopy(tasks.state_dict()))
    plain = torch.optim.Adam(model.parameters())
    plain.load_state_dict(tasks.state_dict())
    assert plain.state_dict()["state"][0]["step"] == 3
    train(tasks, model, range(3, 6))
    train(resumed, resumed_model, range(3, 6))
    assert_equal_models(model, resumed_model, rtol=0)


def test_a_scheduler_of_the_wrapped_optimizer_sets_the_rate(model):
    ours, plain = model, copy.deepcopy(model)
    optimizer, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, plain))
    tasks = ga.TaskOptimizer(optimizer, ga.Mean())
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5) for o in (optimizer, reference)
    ]
    for iteration in range(3):
        tasks.zero_grad()
        tasks.step(losses_of(ours, draw(iteration)))
        reference.zero_grad()
        torch.stack(losses_of(plain, draw(iteration))).mean().backward()
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
    assert tasks.param_groups[0]["lr"] == pytest.approx(0.0125)
    assert_equal_models(ours, plain)


def spoil(losses, case):
    """Losses that step refuses, and what it says."""
    return {
        "matrix": (torch.stack(losses).reshape(3, 1), r"\[n\], found shape \[3, 1\]"),
        "mean": (torch.stack(losses).mean(), r"\[n\], found shape \[\]"),
        "empty vector": (torch.stack(losses)[:0], "at least one task"),
        "empty list": ([], "at least one task"),
        "vectors": ([loss.expand(2) for loss in losses], "a scalar loss, found shape .2."),
        "detached": ([*losses[:2], losses[2].detach()], "loss with a graph"),
        "independent": (
            [*losses[:2], torch.ones((), requires_grad=True) * 2],
            "depends on the parameters",
        ),
        "nan": ([losses[0], losses[1] * float("nan"), losses[2]], r"NaN or inf in tasks \[1\]"),
    }[case]


@pytest.mark.parametrize(
    "case",
    ["matrix", "mean", "empty vector", "empty list", "vectors", "detached", "independent", "nan"],
)
def test_refused_losses_leave_parameters_grads_and_state_untouched(
    model, case, without_type_checks
):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tasks = ga.TaskOptimizer(optimizer, ga.GradientAgreement())
    tasks.step(losses_of(model, draw(0)))

    def snapshot():
        grads = [p.grad for p in model.parameters()]
        return copy.deepcopy((model.state_dict(), grads, optimizer.state_dict()))

    before = snapshot()
    losses, message = spoil(losses_of(model, draw(1)), case)
    with pytest.raises(ValueError, match=message) as caught:
        tasks.step(losses)
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [nn.Linear(2, 2), None, 0.1], ids=["module", "none", "rate"])
def test_something_else_than_an_optimizer_is_refused(optimizer):
    found = type(optimizer).__name__
    with pytest.raises(TypeError, match=f"expected an optimizer .* found {found}; give one as"):
        ga.TaskOptimizer(optimizer, ga.Mean())


def test_an_optimizer_that_needs_a_closure_is_refused(model):
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(TypeError, match=r"found LBFGS, whose step\(\) needs its closure; give"):
        ga.TaskOptimizer(lbfgs, ga.Mean())


def test_a_closure_in_the_place_of_losses_is_refused(model, without_type_checks):
    tasks = ga.TaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ga.Mean())
    with pytest.raises(TypeError, match="found function; compute them before the step"):
        tasks.step(lambda: losses_of(model, draw(0)))
    assert all(p.grad is None for p in model.parameters())
