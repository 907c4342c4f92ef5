"""What TaskBatch and the step refuse in higher's loops, in one sentence each."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga

higher = pytest.importorskip("higher", reason="higher is not installed")

from gradagree_opt.adapters.higher import meta_step  # noqa: E402

from .higher_cases import INNER, adapted  # noqa: E402
from .learners import draw, each, mse, network, vector  # noqa: E402

each_order = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])


@pytest.fixture
def net():
    return network()


def refuses(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


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
