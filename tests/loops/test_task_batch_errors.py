"""What TaskBatch refuses as it is made, in one sentence each."""

import copy

import pytest
import torch

import gradagree_opt as ga

from .conftest import adapted_from, loss_of, named, refuses


@pytest.mark.parametrize("wrong", [ga.Mean, torch.nn.Identity(), None])
def test_what_is_no_aggregator(model, wrong, without_type_checks):
    found = "the class Mean; call it" if wrong is ga.Mean else f"{type(wrong).__name__} of .*; wrap"
    message = f"expected an aggregator as .*, found {found}"
    refuses(lambda: ga.TaskBatch(model, wrong), message, error=TypeError)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refuses(lambda: ga.TaskOptimizer(optimizer, wrong), message, error=TypeError)


def test_parameters_of_which_none_is_trained(model):
    model.requires_grad_(False)
    message = "at least one requires a gradient, found 2 that do not"
    refuses(lambda: ga.TaskBatch(model, ga.Mean()), message)
    refuses(lambda: ga.TaskBatch([], ga.Mean()), "found 0 that do not")


def test_parameters_that_were_computed_from_others(model):
    """A clone in the place of the model: an optimizer steps on none of them."""
    message = "the parameters to train, found 'weight' computed from other tensors; give the model"
    refuses(lambda: ga.TaskBatch(adapted_from(model), ga.Mean()), message)


@pytest.fixture
def empty(model):
    """The module that make_functional returns, or a copy for functional_call: no numbers in it."""
    return copy.deepcopy(model).to("meta")


EMPTY = "that hold numbers, found '.*' on the device meta; give the tensors that the module is"


def test_parameters_of_an_empty_module(empty):
    refuses(lambda: ga.TaskBatch(empty, ga.Mean()), EMPTY)
    refuses(lambda: ga.TaskBatch([*empty.parameters()], ga.Mean()), EMPTY)
    tasks = ga.TaskOptimizer(torch.optim.SGD(empty.parameters(), lr=0.1), ga.Mean())
    refuses(lambda: tasks.step([loss_of(named(empty))]), EMPTY)


@pytest.mark.parametrize("aggregator", [ga.Mean(), ga.GradientAgreement(), ga.EqualAgreement()])
def test_an_empty_module_as_what_has_adapted(model, empty, aggregator):
    batch = ga.TaskBatch(model, aggregator)
    refuses(lambda: batch.add(loss_of(named(model)), adapted=empty), EMPTY)
    refuses(lambda: batch.add(adapted=empty), EMPTY)
    assert not len(batch)


def test_a_frozen_part_that_is_kept_elsewhere_may_be_empty(model):
    """As where the base of an adapter is offloaded: its numbers come when it is called."""
    whole = torch.nn.Sequential(model, torch.nn.Linear(2, 2, device="meta").requires_grad_(False))
    batch = ga.TaskBatch(whole, ga.Mean())
    moved = {n: p + 1 if p.requires_grad else p for n, p in whole.named_parameters()}
    batch.add(adapted=moved)
    batch.backward()
    torch.testing.assert_close(model.weight.grad, -torch.ones_like(model.weight))


@pytest.mark.parametrize("aggregator", [ga.Mean(), ga.GradientAgreement(), ga.EqualAgreement()])
@pytest.mark.parametrize("form", ["multi-task", "MAML", "Reptile", "TaskOptimizer"])
def test_a_task_that_is_added_in_the_middle_of_a_vmap(model, aggregator, form):
    batch = ga.TaskBatch(model, aggregator)
    tasks = ga.TaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), aggregator)

    def one(scale):
        adapted = {name: p * scale for name, p in model.named_parameters()}
        loss = sum((p**2).sum() for p in adapted.values())
        if form == "TaskOptimizer":
            tasks.step([loss])
        elif form == "Reptile":
            batch.add(adapted=adapted)
        else:
            batch.add(loss, **({"adapted": adapted} if form == "MAML" else {}))
        return loss

    message = "those of all tasks in the middle of a vmap; return them from the mapped function"
    refuses(lambda: torch.func.vmap(one)(torch.rand(3)), message)
    assert not len(batch)


def test_a_parameter_that_is_given_twice(model):
    twice = [model.weight, model.bias, model.weight]
    message = "every parameter once, found '0' again as '2'; leave it out there"
    refuses(lambda: ga.TaskBatch(twice, ga.Mean()), message)


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ([1.0], "float"),
        ({"nested": {"w": torch.ones(2, requires_grad=True)}}, "dict"),
        (torch.ones(2, requires_grad=True), "(Tensor|Parameter)"),
        (torch.tensor(1.0, requires_grad=True), "(Tensor|Parameter)"),
        (None, "NoneType"),
    ],
    ids=["numbers", "nested dict", "one tensor", "one 0-d tensor", "nothing"],
)
def test_parameters_that_are_no_collection_of_tensors(parameters, found, without_type_checks):
    call = lambda: ga.TaskBatch(parameters, ga.Mean())  # noqa: E731
    refuses(call, f"expected a module or tensors, found {found}", error=TypeError)


def test_an_unknown_memory(model, without_type_checks):
    call = lambda: ga.TaskBatch(model, ga.Mean(), memory="streams")  # noqa: E731
    refuses(call, "expected memory to be one of 'graph', 'stream'; found 'streams'")


@pytest.mark.parametrize("aggregator", [ga.Mean(), ga.GradientAgreement(), ga.EqualAgreement()])
def test_parameters_on_several_devices(model, aggregator):
    given = named(model) | {"other": torch.zeros(2, device="meta", requires_grad=True)}
    sentence = "on one device, found cpu in 'weight' and meta in 'other'; give each device"
    refuses(lambda: ga.TaskBatch(given, aggregator), sentence)
    optimizer = torch.optim.SGD(given.values(), lr=0.1)
    sentence = "on one device, found cpu in '0' and meta in '2'; give each device"
    refuses(lambda: ga.TaskOptimizer(optimizer, aggregator).step([loss_of(named(model))]), sentence)
