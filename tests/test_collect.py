"""TaskBatch in loops of torch.autograd against the same step as a pure function."""

import copy
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

import gradagree_opt as ga

from .meta.loops import descend, gradient, gradient_with_graph
from .meta.problems import assert_same, loss_fn, problem
from .meta.rules import by_layer

LR = 0.1
STEPS = 2
CASE = problem(n=4)
INNER = ga.InnerSGD(LR, STEPS)
each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])
each_aggregator = pytest.mark.parametrize(
    "aggregator",
    [
        ga.Mean,
        ga.Sum,
        ga.GradientAgreement,
        partial(ga.GradientAgreement, scope="leaf"),
        partial(ga.GradientAgreement, scope=by_layer, match_norm="mean"),
        partial(ga.GradientAgreement, nonfinite="drop"),
        partial(ga.GradientAgreement, nonfinite="propagate", similarity="cosine"),
        lambda: ga.RandomWeights(torch.Generator().manual_seed(5)),
    ],
    ids=["mean", "sum", "agreement", "leaf", "layer", "drop", "propagate", "random"],
)


class Network(nn.Module):
    """The parameters of a problem as a module."""

    def __init__(self, params):
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


class Container(NamedTuple):
    """How TaskBatch is given parameters, and how the adapted ones of a task."""

    given: object
    adapted: object


CONTAINERS = {
    "module and dict": Container(lambda module: module, dict),
    "dicts": Container(lambda module: dict(module.named_parameters()), dict),
    "dicts of another order": Container(
        lambda module: dict(module.named_parameters()), lambda named: dict(reversed(named.items()))
    ),
    "lists": Container(lambda module: list(module.parameters()), lambda named: [*named.values()]),
    "iterators": Container(lambda module: module.parameters(), lambda named: iter(named.values())),
}


def parameters(module):
    return dict(module.named_parameters())


def adapt(params, support, first_order=False):
    """Inner loop attached to the parameters, through the gradients or past them."""
    inner = partial(gradient if first_order else gradient_with_graph, loss_fn, batch=support)
    return descend(inner, params, dict.fromkeys(params, LR), STEPS)[-1]


def add_maml_tasks(batch, module, container=CONTAINERS["dicts"], first_order=False, case=CASE):
    for task in case.each():
        adapted = adapt(parameters(module), task["support"], first_order)
        batch.add(loss_fn(adapted, task["query"]), adapted=container.adapted(adapted))


def add_multi_task_losses(batch, module, case=CASE):
    for task in case.each():
        batch.add(loss_fn(parameters(module), task["query"]))


def assert_filled(module, result, expected):
    """.grad and the result hold the expected step."""
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert_same(grads, expected.update, tolerance=1e-12)
    update = dict(zip(grads, result.update.values(), strict=True))
    assert_same(update, expected.update, tolerance=1e-12)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(result.scores, expected.scores, rtol=1e-11, atol=1e-14)


@each_memory
@each_aggregator
@pytest.mark.parametrize("first_order", [False, True])
def test_loss_and_adapted_parameters_are_maml(memory, aggregator, first_order):
    module = Network(CASE.params)
    batch = ga.TaskBatch(module, aggregator(), memory=memory)
    add_maml_tasks(batch, module, first_order=first_order)
    assert len(batch) == 4
    result = batch.backward()
    maml = ga.MAML(loss_fn, INNER, first_order=first_order)
    assert_filled(module, result, maml.step(CASE.params, CASE.tasks, aggregator()))


@each_memory
@each_aggregator
def test_adapted_parameters_alone_are_reptile(memory, aggregator):
    module = Network(CASE.params)
    batch = ga.TaskBatch(module, aggregator(), memory=memory)
    for task in CASE.each():
        batch.add(adapted=adapt(parameters(module), task["support"], first_order=True))
    result = batch.backward()
    expected = ga.Reptile(loss_fn, INNER).step(CASE.params, CASE.tasks, aggregator())
    assert_filled(module, result, expected)


@each_memory
@each_aggregator
def test_losses_alone_are_multi_task_learning(memory, aggregator):
    module = Network(CASE.params)
    batch = ga.TaskBatch(module, aggregator(), memory=memory)
    add_multi_task_losses(batch, module)
    result = batch.backward()
    expected = ga.aggregate_gradients(loss_fn, CASE.params, CASE.tasks["query"], aggregator())
    assert_filled(module, result, expected)


@each_memory
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_parameters_come_as_a_module_by_name_or_in_order(memory, container):
    module = Network(CASE.params)
    batch = ga.TaskBatch(container.given(module), ga.GradientAgreement(), memory=memory)
    add_maml_tasks(batch, module, container)
    expected = ga.MAML(loss_fn, INNER).step(CASE.params, CASE.tasks, ga.GradientAgreement())
    assert_filled(module, batch.backward(), expected)


def test_names_decide_where_shapes_do_not():
    params = {name: torch.zeros(2, requires_grad=True) for name in ("a", "b")}
    batch = ga.TaskBatch(params, ga.Mean())
    batch.add(adapted={"b": torch.tensor([-1.0, 0.0]), "a": torch.tensor([0.0, -2.0])})
    batch.backward()
    assert params["a"].grad.tolist() == [0, 2]
    assert params["b"].grad.tolist() == [1, 0]


def test_learners_may_be_copies_that_an_optimizer_trains():
    module = Network(CASE.params)
    batch = ga.TaskBatch(module, ga.GradientAgreement())
    for task in CASE.each():
        learner = copy.deepcopy(module)
        optimizer = torch.optim.SGD(learner.parameters(), lr=LR)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_fn(parameters(learner), task["support"]).backward()
            optimizer.step()
        batch.add(adapted=learner)
    expected = ga.Reptile(loss_fn, INNER).step(CASE.params, CASE.tasks, ga.GradientAgreement())
    assert_filled(module, batch.backward(), expected)


@each_memory
@pytest.mark.parametrize("add", [add_maml_tasks, add_multi_task_losses])
def test_update_is_added_to_grad(memory, add):
    fresh, used = Network(CASE.params), Network(CASE.params)
    before = {name: torch.randn_like(p) for name, p in used.named_parameters()}
    for name, p in used.named_parameters():
        p.grad = before[name].clone()
    for module in (fresh, used):
        batch = ga.TaskBatch(module, ga.GradientAgreement(), memory=memory)
        add(batch, module)
        batch.backward()
    expected = {name: before[name] + p.grad for name, p in fresh.named_parameters()}
    grads = {name: p.grad for name, p in used.named_parameters()}
    assert_same(grads, expected, tolerance=1e-13)


@each_memory
@pytest.mark.parametrize("add", [add_maml_tasks, add_multi_task_losses])
def test_ready_for_the_next_batch_after_backward(memory, add):
    module = Network(CASE.params)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batch = ga.TaskBatch(module, ga.GradientAgreement(), memory=memory)
    for seed in range(3):
        case = problem(n=2 + seed, seed=seed)
        optimizer.zero_grad()
        add(batch, module, case=case)
        result = batch.backward()
        assert len(batch) == 0
        params = {name: p.detach().clone() for name, p in module.named_parameters()}
        if add is add_maml_tasks:
            expected = ga.MAML(loss_fn, INNER).step(params, case.tasks, ga.GradientAgreement())
        else:
            tasks = case.tasks["query"]
            expected = ga.aggregate_gradients(loss_fn, params, tasks, ga.GradientAgreement())
        assert_filled(module, result, expected)
        optimizer.step()


def test_forms_may_change_from_batch_to_batch():
    module = Network(CASE.params)
    batch = ga.TaskBatch(module, ga.GradientAgreement())
    add_maml_tasks(batch, module)
    batch.backward()
    module.zero_grad()
    add_multi_task_losses(batch, module)
    tasks = CASE.tasks["query"]
    expected = ga.aggregate_gradients(loss_fn, CASE.params, tasks, ga.GradientAgreement())
    assert_filled(module, batch.backward(), expected)


@each_memory
@pytest.mark.parametrize("add", [add_maml_tasks, add_multi_task_losses])
def test_frozen_parameters_take_no_part(memory, add):
    frozen = "bias1"
    module = Network(CASE.params)
    module.get_parameter(frozen).requires_grad_(False)
    trained = {name: p for name, p in CASE.params.items() if name != frozen}

    def loss_of_trained(params, batch):
        return loss_fn(params | {frozen: CASE.params[frozen]}, batch)

    batch = ga.TaskBatch(module, ga.GradientAgreement(scope="leaf"), memory=memory)
    if add is add_maml_tasks:
        for task in CASE.each():
            inner = partial(gradient_with_graph, loss_of_trained, batch=task["support"])
            start = {name: p for name, p in module.named_parameters() if name != frozen}
            adapted = descend(inner, start, dict.fromkeys(start, LR), STEPS)[-1]
            everything = {name: adapted.get(name, p) for name, p in module.named_parameters()}
            batch.add(loss_of_trained(adapted, task["query"]), adapted=everything)
        meta = ga.MAML(loss_of_trained, INNER)
        expected = meta.step(trained, CASE.tasks, ga.GradientAgreement(scope="leaf"))
    else:
        add(batch, module)
        expected = ga.aggregate_gradients(
            loss_of_trained, trained, CASE.tasks["query"], ga.GradientAgreement(scope="leaf")
        )
    result = batch.backward()
    assert module.get_parameter(frozen).grad is None
    assert_same(result.update, expected.update, tolerance=1e-12)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-11, atol=1e-14)


@each_memory
def test_a_parameter_that_one_task_does_not_use_gets_the_part_of_the_others(memory):
    shared, head = (torch.ones(2, requires_grad=True) for _ in range(2))
    batch = ga.TaskBatch({"shared": shared, "head": head}, ga.Mean(), memory=memory)
    batch.add((shared * torch.tensor([2.0, 4.0])).sum())
    batch.add((shared * head * torch.tensor([6.0, 8.0])).sum())
    batch.backward()
    assert shared.grad.tolist() == [4, 6]
    assert head.grad.tolist() == [3, 4]


@each_memory
@pytest.mark.parametrize("maml", [False, True])
def test_a_parameter_that_no_task_uses_is_left_without_grad_as_by_backward(memory, maml):
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    batch = ga.TaskBatch([used, unused], ga.Mean(), memory=memory)
    for target in (0.0, 3.0):
        adapted = [used - 0.1 * 2 * (used - target), unused]
        point = adapted[0] if maml else used
        loss = ((point - target) ** 2).sum()
        batch.add(loss, adapted=adapted) if maml else batch.add(loss)
    batch.backward()
    assert used.grad is not None
    assert unused.grad is None


def test_later_changes_of_grad_do_not_reach_the_result():
    module = Network(CASE.params)
    batch = ga.TaskBatch(module, ga.Mean())
    add_multi_task_losses(batch, module)
    result = batch.backward()
    before = copy.deepcopy(result.update)
    module.zero_grad(set_to_none=False)
    assert_same(result.update, before, tolerance=0)
