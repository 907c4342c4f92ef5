"""What TaskBatch takes for parameters and for the learner adapted from them."""

import copy
from functools import partial
from typing import NamedTuple

import pytest
import torch

import gradagree_opt as ga

from ..meta.loops import descend, gradient, gradient_with_graph
from ..meta.problems import assert_same, loss_fn
from .collecting import (
    CASE,
    INNER,
    LR,
    STEPS,
    Network,
    adapt,
    add_maml_tasks,
    add_multi_task_losses,
    assert_filled,
    each_aggregator,
    each_memory,
    parameters,
)


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
    "a wrapped learner": Container(
        lambda module: module, lambda named: {f"module.{name}": p for name, p in named.items()}
    ),
    "lists": Container(lambda module: list(module.parameters()), lambda named: [*named.values()]),
    "iterators": Container(lambda module: module.parameters(), lambda named: iter(named.values())),
}


@each_memory
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_parameters_come_as_a_module_by_name_or_in_order(memory, container):
    module = Network(CASE.params)
    batch = ga.TaskBatch(container.given(module), ga.GradientAgreement(), memory=memory)
    add_maml_tasks(batch, module, container.adapted)
    expected = ga.MAML(loss_fn, INNER).step(CASE.params, CASE.tasks, ga.GradientAgreement())
    assert_filled(module, batch.backward(), expected)


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("0", "1")])
def test_names_decide_where_shapes_do_not(first, second):
    params = {name: torch.zeros(2, requires_grad=True) for name in (first, second)}
    batch = ga.TaskBatch(params, ga.Mean())
    batch.add(adapted={second: torch.tensor([-1.0, 0.0]), first: torch.tensor([0.0, -2.0])})
    batch.backward()
    assert params[first].grad.tolist() == [0, 2]
    assert params[second].grad.tolist() == [1, 0]


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
def test_learners_of_detached_tensors_are_first_order_maml(memory):
    module = Network(CASE.params)
    batch = ga.TaskBatch(module, ga.GradientAgreement(), memory=memory)
    for task in CASE.each():
        moved = adapt(parameters(module), task["support"], first_order=True)
        learner = {name: p.detach().requires_grad_() for name, p in moved.items()}
        batch.add(loss_fn(learner, task["query"]), adapted=learner)
    fomaml = ga.MAML(loss_fn, INNER, first_order=True)
    expected = fomaml.step(CASE.params, CASE.tasks, ga.GradientAgreement())
    assert_filled(module, batch.backward(), expected)


@each_memory
@pytest.mark.parametrize("leaves", [False, True], ids=["constants", "parts of leaves"])
def test_detached_parts_of_what_one_vmap_has_adapted_are_told_how_to_be_first_order(memory, leaves):
    module = Network(CASE.params)
    adapt_each = torch.func.vmap(lambda support: INNER(loss_fn, CASE.params, support))
    stack = adapt_each(CASE.tasks["support"])
    stack = {name: p.detach().requires_grad_(leaves) for name, p in stack.items()}
    batch = ga.TaskBatch(module, ga.GradientAgreement(), memory=memory)
    parts = [{name: p[i] for name, p in stack.items()} for i in range(len(CASE.each()))]
    with pytest.raises(ValueError, match=r"; for first-order MAML, .*detach\(\)\.requires_grad_"):
        batch.add(loss_fn(parts[0], CASE.each()[0]["query"]), adapted=parts[0])
    assert not len(batch)
    for part, task in zip(parts, CASE.each(), strict=True):
        learner = {name: p.detach().requires_grad_() for name, p in part.items()}  # as it advises
        batch.add(loss_fn(learner, task["query"]), adapted=learner)
    fomaml = ga.MAML(loss_fn, INNER, first_order=True)
    expected = fomaml.step(CASE.params, CASE.tasks, ga.GradientAgreement())
    assert_filled(module, batch.backward(), expected)


def adapt_last_layer(loss, params, support, /, *, first_order=False, steps=None):
    """ANIL's inner loop: one step of the last layer."""
    last = {name: p for name, p in params.items() if name.endswith("2")}
    grads = torch.func.grad(lambda moved: loss(params | moved, support))(last)
    return params | {name: p - LR * grads[name] for name, p in last.items()}


@each_memory
@each_aggregator
def test_parameters_that_do_not_adapt_may_be_left_out_of_the_learner(memory, aggregator):
    module = Network(CASE.params)
    batch = ga.TaskBatch(module, aggregator(), memory=memory)
    for task in CASE.each():
        adapted = adapt_last_layer(loss_fn, parameters(module), task["support"])
        last = {name: p for name, p in adapted.items() if name.endswith("2")}
        batch.add(loss_fn(adapted, task["query"]), adapted=last)
    anil = ga.MAML(loss_fn, adapt_last_layer)
    assert_filled(module, batch.backward(), anil.step(CASE.params, CASE.tasks, aggregator()))


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


TAKEN_APART = {
    "views by index": lambda stack, at: stack[at],
    "unbound": lambda stack, at: stack.unbind()[at],
    "narrowed": lambda stack, at: stack.narrow(0, at, 1).squeeze(0),
    "copies": lambda stack, at: stack[at].detach(),
}


@pytest.mark.parametrize("aggregator", [ga.Sum, ga.GradientAgreement, ga.EqualAgreement])
@pytest.mark.parametrize("container", [dict, lambda named: [*named.values()]], ids=["dict", "list"])
@pytest.mark.parametrize("part", TAKEN_APART.values(), ids=TAKEN_APART)
def test_what_one_vmap_has_adapted_is_taken_apart_by_task(part, container, aggregator):
    module = Network(CASE.params)

    def one(task):
        adapted = parameters(module)
        for _ in range(STEPS):
            grads = torch.func.grad(loss_fn)(adapted, task["support"])
            adapted = {name: p - LR * grads[name] for name, p in adapted.items()}
        return loss_fn(adapted, task["query"]), adapted

    losses, adapted = torch.func.vmap(one)(CASE.tasks)
    batch = ga.TaskBatch(container(parameters(module)), aggregator())
    for at, loss in enumerate(losses):
        batch.add(loss, adapted=container({name: part(p, at) for name, p in adapted.items()}))
    expected = ga.MAML(loss_fn, INNER).step(CASE.params, CASE.tasks, aggregator())
    assert_filled(module, batch.backward(), expected)


@pytest.mark.parametrize("container", [dict, lambda named: [*named.values()]], ids=["dict", "list"])
@pytest.mark.parametrize("with_loss", [True, False], ids=["MAML", "Reptile"])
def test_the_stacks_of_all_tasks_in_the_place_of_one_task(container, with_loss):
    module = Network(CASE.params)
    own = parameters(module)
    batch = ga.TaskBatch(container(own), ga.Mean())
    losses = (loss_fn(own, CASE.task(0)["query"]),) if with_loss else ()
    stacks = container({name: torch.stack([p * 2, p * 3]) for name, p in own.items()})
    with pytest.raises(ValueError, match=r"\(of what a vmap has stacked, p\[i\] for task i\)"):
        batch.add(*losses, adapted=stacks)


@pytest.mark.parametrize("part", [TAKEN_APART["views by index"], TAKEN_APART["unbound"]])
def test_views_of_what_another_model_has_adapted_are_refused(part):
    module, other = Network(CASE.params), Network(CASE.params)
    stacks = {name: torch.stack([p * 2, p * 3]) for name, p in parameters(other).items()}
    batch = ga.TaskBatch(module, ga.Mean())
    loss = loss_fn(parameters(module), CASE.task(0)["query"])
    with pytest.raises(ValueError, match="depends on none of them; add every loss with its own"):
        batch.add(loss, adapted={name: part(p, 0) for name, p in stacks.items()})
    assert not len(batch)


@each_memory
@pytest.mark.parametrize("shared", ["weight1 bias1", "scale2", "weight1 bias1 weight2"])
@pytest.mark.parametrize("aggregator", [ga.Mean(), ga.GradientAgreement(), ga.NormShare()])
def test_a_detached_copy_that_tasks_share_counts_once(memory, shared, aggregator):
    module = Network(CASE.params)
    names = shared.split()
    batch = ga.TaskBatch(module, aggregator, memory=memory)
    common = {n: p.detach().requires_grad_() for n, p in parameters(module).items()}
    signals, directions = [], []
    for index, task in enumerate(CASE.each()):
        own = {n: (p - 0.1 * index).detach().requires_grad_() for n, p in common.items()}
        adapted = own | {name: common[name] for name in names}
        batch.add(loss_fn(adapted, task["query"]), adapted=adapted)
        directions.append(gradient(loss_fn, adapted, task["query"]))
        signals.append({n: (CASE.params[n] - p).detach() for n, p in adapted.items()})
    result = batch.backward()
    stack = [
        {n: torch.stack([each[n] for each in trees]) for n in common}
        for trees in (directions, signals)
    ]
    expected = aggregator.aggregate(*stack)
    assert_same(
        {n: p.grad for n, p in parameters(module).items()}, expected.update, tolerance=1e-12
    )
    torch.testing.assert_close(result.weights, expected.weights)
