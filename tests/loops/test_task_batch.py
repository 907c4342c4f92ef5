"""TaskBatch in loops of torch.autograd against the same step as a pure function."""

import copy

import pytest
import torch

import gradagree_opt as ga

from ..meta.problems import assert_same, loss_fn, problem
from .collecting import (
    CASE,
    INNER,
    Network,
    adapt,
    add_maml_tasks,
    add_multi_task_losses,
    assert_filled,
    each_aggregator,
    each_memory,
    parameters,
)


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
    if result.scores.isnan().all():  # not measured
        assert memory == "graph" and isinstance(aggregator(), ga.Mean | ga.Sum | ga.RandomWeights)
        expected = expected._replace(scores=result.scores)
    assert_filled(module, result, expected)


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


@pytest.mark.parametrize("aggregator", [ga.GradientAgreement(), ga.EqualAgreement()], ids=repr)
@pytest.mark.parametrize("n", [2, 3])
def test_a_loss_that_is_added_twice_is_two_tasks(aggregator, n):
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    batch = ga.TaskBatch([w], aggregator)
    loss = w.square().sum()
    for _ in range(n):
        batch.add(loss)
    batch.backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())
