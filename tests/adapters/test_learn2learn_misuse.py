"""What TaskBatch refuses in loops over learn2learn's learners, in one sentence each."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga

l2l = pytest.importorskip("learn2learn", reason="learn2learn is not installed")

from .learn2learn_cases import ALGORITHMS, adapted  # noqa: E402
from .learners import RATE, draw, each, grads, mse, network  # noqa: E402

each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])


@pytest.fixture
def maml():
    return l2l.algorithms.MAML(network(), lr=RATE)


@pytest.fixture
def task():
    return each(draw())[0]


def refuses(call, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@each_memory
def test_the_algorithm_in_place_of_its_learner(maml, task, memory):
    batch = ga.TaskBatch(maml, ga.GradientAgreement(), memory=memory)
    loss = mse(maml, task["query"])
    refuses(lambda: batch.add(loss, adapted=maml), "the parameters of the batch themselves")


@pytest.mark.parametrize("wrong", ["prediction", "loss", "function", "optimizer"])
def test_what_is_no_learner(maml, task, wrong, without_type_checks):
    batch, learner = ga.TaskBatch(maml, ga.GradientAgreement()), adapted(maml, task)
    loss = mse(learner, task["query"])
    values = {
        "prediction": learner(task["query"][0]),
        "loss": loss,
        "function": learner.forward,
        "optimizer": torch.optim.SGD(maml.parameters(), lr=0.1),
    }
    found = f"expected a module or tensors, found {type(values[wrong]).__name__}"
    refuses(lambda: batch.add(loss, adapted=values[wrong]), found, TypeError)
    assert len(batch) == 0


@each_memory
def test_a_learner_of_another_model_of_the_same_shapes(maml, task, memory):
    batch = ga.TaskBatch(maml, ga.GradientAgreement(), memory=memory)
    learner = adapted(copy.deepcopy(maml), task)
    loss = mse(learner, task["query"])
    message = r"depends on none of them; adapt from those that the batch was given: by clone\(\)"
    refuses(lambda: batch.add(loss, adapted=learner), message)


def test_a_learner_of_another_model_of_other_shapes(maml, task):
    batch = ga.TaskBatch(maml, ga.GradientAgreement())
    wide = l2l.algorithms.MAML(nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1)), lr=RATE)
    refuses(lambda: batch.add(adapted=wide.clone()), r"found \[9, 3\] for 'module.0.weight'")
    other = l2l.algorithms.MAML(nn.ModuleDict({"a": network()[0], "b": network()[2]}), lr=RATE)
    refuses(lambda: batch.add(adapted=other.clone()), "expected the learner of the same model")
    deep = l2l.algorithms.MAML(nn.Sequential(network(), nn.Linear(1, 1)), lr=RATE)
    refuses(lambda: batch.add(adapted=deep.clone()), "for the 4 of the batch, found 6")


@each_memory
def test_a_learner_of_another_task(maml, memory):
    batch = ga.TaskBatch(maml, ga.GradientAgreement(), memory=memory)
    first, second = (adapted(maml, task) for task in each(draw(2)))
    loss = mse(first, each(draw())[0]["query"])
    refuses(lambda: batch.add(loss, adapted=second), "add every loss with its own learner")


@each_memory
def test_a_loss_from_before_the_inner_steps(maml, task, memory):
    batch = ga.TaskBatch(maml, ga.GradientAgreement(), memory=memory)
    learner = maml.clone()
    loss = mse(learner, task["query"])
    learner.adapt(mse(learner, task["support"]))
    refuses(lambda: batch.add(loss, adapted=learner), "computed after its last inner step")


@pytest.mark.parametrize("name", ["MAML", "MetaSGD", "GBML"])
def test_a_loss_that_has_had_its_own_backward(name, task):
    algorithm = ALGORITHMS[name](network(), False)
    learner = adapted(algorithm, task)
    loss = mse(learner, task["query"])
    loss.backward()
    before = grads(algorithm)
    stream = ga.TaskBatch(algorithm, ga.GradientAgreement(), memory="stream")
    refuses(lambda: stream.add(loss, adapted=learner), "one that a backward pass has freed")
    graph = ga.TaskBatch(algorithm, ga.GradientAgreement())
    graph.add(loss, adapted=learner)
    refuses(graph.backward, "one that a backward pass has freed")
    torch.testing.assert_close(grads(algorithm), before, rtol=0, atol=0)


@each_memory
def test_a_task_of_the_batch_before(maml, task, memory):
    batch = ga.TaskBatch(maml, ga.GradientAgreement(), memory=memory)
    learner = adapted(maml, task)
    loss = mse(learner, task["query"])
    batch.add(loss, adapted=learner)
    batch.backward()

    def again():
        batch.add(loss, adapted=learner)
        batch.backward()

    refuses(again, "one that a backward pass has freed")


def test_a_loss_of_parameters_that_an_optimizer_has_changed_since():
    net = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    task = each(draw())[0]
    hidden = nn.Sequential(nn.Linear(3, 3).double(), net)
    batch = ga.TaskBatch(hidden, ga.GradientAgreement())
    batch.add(mse(hidden, task["query"]))
    net.weight.grad = torch.ones_like(net.weight)
    optimizer.step()
    refuses(batch.backward, "compute and add the losses after the optimizer's last step")


def test_meta_sgd_needs_names_to_tell_its_rates_from_its_parameters(task):
    algorithm = ALGORITHMS["MetaSGD"](network(), False)
    batch = ga.TaskBatch(algorithm.parameters(), ga.GradientAgreement())
    learner = adapted(algorithm, task)
    loss = mse(learner, task["query"])
    message = "for the 8 of the batch, found 4; give TaskBatch the module itself"
    refuses(lambda: batch.add(loss, adapted=learner), message)
