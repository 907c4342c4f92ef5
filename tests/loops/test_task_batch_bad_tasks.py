"""Tasks that TaskBatch refuses, in one sentence each, and that nothing has changed then."""

import copy

import pytest
import torch
from torch import nn

import gradagree_opt as ga

from .conftest import adapted_from, loss_of, named, refuses

each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])
NAN = float("nan")


@pytest.fixture
def batch(model):
    return ga.TaskBatch(model, ga.GradientAgreement())


def test_neither_loss_nor_adapted_parameters(batch):
    refuses(batch.add, "expected a loss, adapted parameters or both, found neither")


FORMS = ["(loss)", "(adapted=…)", "(loss, adapted=…)"]


def add_as(form, batch, model):
    adapted = adapted_from(model)
    if form == "(loss)":
        batch.add(loss_of(named(model)))
    elif form == "(adapted=…)":
        batch.add(adapted=adapted)
    else:
        batch.add(loss_of(adapted), adapted=adapted)


@each_memory
@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_tasks_of_two_forms(model, memory, first, second):
    batch = ga.TaskBatch(model, ga.GradientAgreement(), memory=memory)
    add_as(first, batch, model)
    if first == second:
        add_as(second, batch, model)
        assert len(batch) == 2
        return
    with pytest.raises(ValueError, match="every task of a batch in one form") as caught:
        add_as(second, batch, model)
    assert f"found add{second} after add{first}" in str(caught.value)
    assert len(batch) == 1
    batch.clear()
    add_as(second, batch, model)
    assert len(batch) == 1


def test_a_learner_of_another_model(batch):
    other = nn.Linear(3, 4, dtype=torch.float64)
    refuses(lambda: batch.add(adapted=other), r"of the same shapes, found \[4, 3\] for 'weight'")


def test_a_learner_with_other_parameters(batch):
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    refuses(lambda: batch.add(adapted=other), "expected adapted parameters for the 2 .* found 4")


def test_a_learner_of_something_else_than_tensors(batch, without_type_checks):
    refuses(lambda: batch.add(adapted=[1.0, 2.0]), "or tensors, found float", error=TypeError)
    refuses(lambda: batch.add(adapted=3), "or tensors, found int", error=TypeError)


@pytest.mark.parametrize("loss", [torch.ones(3, requires_grad=True), 1.0], ids=["vector", "float"])
def test_a_loss_that_is_no_scalar(batch, loss, without_type_checks):
    found = "shape .3. for task 0; reduce it" if isinstance(loss, torch.Tensor) else "float .* give"
    refuses(lambda: batch.add(loss), f"expected a scalar loss, found {found}")


def test_a_loss_without_a_graph(batch, model):
    with torch.no_grad():
        loss = loss_of(named(model))
    refuses(lambda: batch.add(loss), "with a graph, found one that requires no gradient")


@pytest.mark.parametrize("loss", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
def test_the_loss_of_a_task_without_examples(batch, loss, without_type_checks):
    refuses(lambda: batch.add(loss), ", and leave out a task that has no examples$")


@each_memory
@pytest.mark.parametrize("maml", [True, False])
def test_a_loss_of_another_model(model, memory, maml):
    """The usual mistake: a deep copy adapts, and is no longer attached to the model."""
    batch = ga.TaskBatch(model, ga.GradientAgreement(), memory=memory)
    learner = copy.deepcopy(model)
    loss = loss_of(named(learner))
    add = (lambda: batch.add(loss, adapted=learner)) if maml else (lambda: batch.add(loss))
    refuses(add, "expected a loss that depends on the parameters")
    assert len(batch) == 0


@each_memory
@pytest.mark.parametrize("maml", [True, False])
def test_one_loss_of_another_model_among_right_ones(model, memory, maml):
    batch = ga.TaskBatch(model, ga.GradientAgreement(), memory=memory)
    add_as("(loss, adapted=…)" if maml else "(loss)", batch, model)
    learner = copy.deepcopy(model)
    loss = loss_of(named(learner))
    add = (lambda: batch.add(loss, adapted=learner)) if maml else (lambda: batch.add(loss))
    refuses(add, "expected a loss that depends on the parameters")
    assert len(batch) == 1


@pytest.mark.parametrize(
    "itself",
    [lambda m: m, lambda m: m.state_dict(), lambda m: [p.data for p in m.parameters()]],
    ids=["module", "state_dict", "data"],
)
def test_the_parameters_themselves_in_place_of_a_learner(batch, model, itself):
    message = "found the parameters of the batch themselves"
    refuses(lambda: batch.add(adapted=itself(model)), message)
    copied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch.add(adapted=copied)
    assert len(batch) == 1


@each_memory
def test_the_loss_of_one_learner_with_another(model, memory):
    batch = ga.TaskBatch(model, ga.GradientAgreement(), memory=memory)
    loss = loss_of(adapted_from(model))
    refuses(
        lambda: batch.add(loss, adapted=adapted_from(model)),
        "loss of the adapted parameters, found one for task 0 that depends on none",
    )
    assert len(batch) == 0


@pytest.mark.parametrize("form", ["(loss)", "(loss, adapted=…)"])
def test_parameters_that_change_before_backward(model, batch, form):
    adapted = {name: p * p for name, p in named(model).items()}
    loss = sum(p.sum() for p in adapted.values())
    batch.add(loss) if form == "(loss)" else batch.add(loss, adapted=adapted)
    with torch.no_grad():
        model.weight += 1
    refuses(batch.backward, "found one whose graph holds tensors changed since")
    assert all(p.grad is None for p in model.parameters())
    assert len(batch) == 0


@pytest.mark.parametrize("form", ["(loss)", "(loss, adapted=…)"])
def test_a_loss_that_has_been_backpropagated(model, batch, form):
    adapted = {name: p.exp() for name, p in named(model).items()}
    loss = loss_of(
        {name: p.exp() for name, p in named(model).items()} if form == "(loss)" else adapted
    )
    loss.backward()
    model.zero_grad()
    batch.add(loss) if form == "(loss)" else batch.add(loss, adapted=adapted)
    refuses(batch.backward, "found one that a backward pass has freed")
    assert all(p.grad is None for p in model.parameters())
    assert len(batch) == 0


def test_backward_on_an_empty_batch(batch, model):
    refuses(batch.backward, "expected at least one task, found an empty batch")
    assert all(p.grad is None for p in model.parameters())


@each_memory
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("filled", [True, False])
def test_a_nan_task_is_named_and_touches_neither_grad_nor_the_next_batch(
    model, memory, form, filled
):
    before = {name: torch.ones_like(p) if filled else None for name, p in named(model).items()}
    for name, p in model.named_parameters():
        p.grad = None if before[name] is None else before[name].clone()
    batch = ga.TaskBatch(model, ga.GradientAgreement(), memory=memory)
    for target in (1.0, NAN, 2.0):
        adapted = adapted_from(model, target)
        loss = loss_of(named(model) if form == "(loss)" else adapted, target)
        if form == "(loss)":
            batch.add(loss)
        elif form == "(adapted=…)":
            batch.add(adapted=adapted)
        else:
            batch.add(loss, adapted=adapted)
    refuses(batch.backward, r"found NaN or inf in tasks \[1\]")
    for name, p in model.named_parameters():
        assert (p.grad is None) == (before[name] is None)
        assert p.grad is None or torch.equal(p.grad, before[name])
    assert len(batch) == 0

    model.zero_grad()
    add_as(form, batch, model)
    result = batch.backward()
    assert result.weights.tolist() == [1.0]
    assert all(p.grad.isfinite().all() for p in model.parameters())


@each_memory
@pytest.mark.parametrize("form", ["(loss)", "(loss, adapted=…)"])
def test_drop_leaves_the_nan_task_out(model, memory, form):
    def step(targets, **options):
        twin = copy.deepcopy(model)
        batch = ga.TaskBatch(twin, ga.GradientAgreement(**options), memory=memory)
        for target in targets:
            adapted = adapted_from(twin, target)
            if form == "(loss)":
                batch.add(loss_of(named(twin), target))
            else:
                batch.add(loss_of(adapted, target), adapted=adapted)
        batch.backward()
        return [p.grad for p in twin.parameters()]

    torch.testing.assert_close(
        step((1.0, NAN, 2.0), nonfinite="drop"), step((1.0, 2.0)), rtol=1e-12, atol=0
    )


def test_scores_that_cancel_raise_where_asked_to():
    w = torch.zeros(2, requires_grad=True)
    batch = ga.TaskBatch([w], ga.GradientAgreement(degenerate="raise"))
    batch.add(w.sum())
    batch.add(-w.sum())
    refuses(batch.backward, "found scores that cancel to zero")
    assert w.grad is None
    assert len(batch) == 0


def test_a_task_that_is_refused_is_not_counted():
    w = torch.tensor([1.0], requires_grad=True)
    batch = ga.TaskBatch([w], ga.GradientAgreement(), memory="stream")
    stale = (w**2).sum()
    stale.backward()
    with pytest.raises(ValueError, match="found one that a backward pass has freed"):
        batch.add(stale)
    w.grad = None
    for target in (2.0, 3.0):
        batch.add(((w - target) ** 2).sum())
    batch.backward()
    expected = ga.GradientAgreement()(torch.tensor([[-2.0], [-4.0]]))
    torch.testing.assert_close(w.grad, expected)


def test_a_learner_on_another_device_is_not_counted():
    w = torch.tensor([1.0], requires_grad=True)
    batch = ga.TaskBatch([w], ga.GradientAgreement())
    with pytest.raises(ValueError, match="on the device meta"):
        batch.add((w**2).sum(), adapted=[torch.zeros(1, device="meta")])
    assert len(batch) == 0
    batch.add((w**2).sum())  # of another form: the batch is empty
