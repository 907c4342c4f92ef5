"""Inputs that scripts have: they are taken, or one sentence says what to give instead."""

from collections import UserDict
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import gradagree_opt as ga

X = torch.tensor([[1.0], [3.0]])
TASKS = {"support": X, "query": X}


def loss_fn(w, x):
    return ((w - x) ** 2).mean()


@pytest.mark.parametrize(
    "rate",
    [
        *(0.25, torch.tensor(0.25), np.float32(0.25), np.float64(0.25), np.array(0.25)),
        *(Fraction(1, 4), nn.Parameter(torch.tensor(0.25))),
    ],
    ids=["float", "tensor", "float32", "float64", "array", "fraction", "parameter"],
)
def test_an_inner_rate_is_any_number(rate, without_type_checks):
    params = {"a": torch.tensor(0.0), "b": torch.zeros(2)}

    def loss(params, x):
        return loss_fn(params["a"], x) + loss_fn(params["b"], x)

    expected = ga.MAML(loss, ga.InnerSGD(0.25, 1)).step(params, TASKS, ga.Mean())
    found = ga.MAML(loss, ga.InnerSGD(rate, 1)).step(params, TASKS, ga.Mean())
    torch.testing.assert_close(found.update, expected.update)


@pytest.mark.parametrize(
    "rate",
    [
        "0.25",
        None,
        Decimal("0.25"),
        np.array([0.25]),
        {"a": torch.tensor(0.25), "b": "0.25"},
        0.25j,
    ],
    ids=["string", "none", "decimal", "array", "dict", "complex"],
)
def test_an_inner_rate_that_is_no_number_is_refused_by_its_type(rate, without_type_checks):
    kind = type(rate["b"] if isinstance(rate, dict) else rate).__name__
    message = rf"expected lr to be a number, .*, found {kind}; give float\(lr\)"
    with pytest.raises(TypeError, match=message):
        ga.InnerSGD(rate, 1)


@dataclass
class Batch:
    x: torch.Tensor


REFUSED = {
    "UserDict": (UserDict(x=X), TypeError, r"found UserDict; give dict\(UserDict\)"),
    "dataclass": (Batch(X), TypeError, r"found Batch; give vars\(Batch\)"),
    "nested": (
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        ValueError,
        "found a nested tensor; pad the tasks",
    ),
    "unequal": (
        [torch.ones(2), torch.ones(3)],
        ValueError,
        "pad tasks of unequal size, with a mask",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tasks_that_are_no_stack_are_refused_with_what_to_give(kind):
    tasks, error, message = REFUSED[kind]
    with pytest.raises(error, match=message) as caught:
        ga.task_gradients(lambda w, batch: w.sum(), torch.tensor(0.0), tasks)
    assert "\n" not in str(caught.value)


def test_complex_parameters_are_refused_with_what_to_give():
    with pytest.raises(TypeError, match=r"found torch.complex64; hold it as torch.view_as_real"):
        ga.task_gradients(lambda w, x: w.abs().sum(), torch.ones(2, dtype=torch.complex64), X)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"a": torch.tensor(1.0)}, r"found dict; give list\(losses.values\(\)\)"),
        (None, "found none; a GradScaler, and what else calls step"),
    ],
)
def test_losses_that_are_no_sequence_are_refused(losses, message, without_type_checks):
    w = torch.tensor(0.0, requires_grad=True)
    optimizer = ga.TaskOptimizer(torch.optim.SGD([w], lr=0.1), aggregator=ga.Mean())
    with pytest.raises(TypeError, match=message):
        optimizer.step(losses)
    with pytest.raises(TypeError, match="a GradScaler"):
        optimizer.step()


def task_losses(w):
    return (w - torch.tensor([1.0, 2.0, 3.0])) ** 2


LOSSES = {
    "complex": (lambda w: list(task_losses(w) * 1j), "a real loss, found torch.complex64 for task"),
    "none": (lambda w: [*task_losses(w), None], "a scalar loss, found NoneType for task 3"),
    "pair": (lambda w: [(loss, None) for loss in task_losses(w)], "loss, found tuple for task 0"),
    "column": (lambda w: list(task_losses(w)[:, None]), r"found shape \[1\] for task 0"),
    "detached": (lambda w: [*task_losses(w), torch.ones(())], "no gradient for task 3"),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("wrapped", ["torch", "torchopt"])
def test_a_loss_that_is_none_is_named_before_anything_is_touched(
    kind, wrapped, without_type_checks
):
    make, message = LOSSES[kind]
    w = torch.tensor(0.0, requires_grad=True)
    if wrapped == "torch":
        call = ga.TaskOptimizer(torch.optim.SGD([w], lr=0.1), ga.GradientAgreement()).step
    else:
        pytest.importorskip("torchopt")
        from gradagree_opt.adapters.torchopt import weighted_loss

        def call(losses):
            return weighted_loss(losses, (w,), ga.GradientAgreement())

    with pytest.raises(ValueError, match=message) as caught:
        call(make(w))
    assert "\n" not in str(caught.value)
    assert w.grad is None and w.item() == 0.0


def test_task_batch_refuses_a_complex_loss():
    w = torch.tensor(0.0, requires_grad=True)
    batch = ga.TaskBatch([w], ga.Mean())
    with pytest.raises(ValueError, match=r"found torch.complex64 for task 0; take its real part"):
        batch.add(w * 1j)
    assert not len(batch)


@pytest.mark.parametrize("sparse", [True, False])
def test_an_optimizer_of_sparse_gradients_alone_is_refused(sparse):
    module = nn.Embedding(4, 2, sparse=sparse)
    optimizer = torch.optim.SparseAdam(list(module.parameters()))
    with pytest.raises(TypeError, match="found SparseAdam; take Adam or SGD"):
        ga.TaskOptimizer(optimizer, ga.Mean())


COMPLEX = {
    "TaskBatch": lambda module: ga.TaskBatch(module, ga.Mean()).add(module(torch.ones(2))),
    "Reptile": lambda module: ga.TaskBatch(module, ga.Mean()).add(adapted=deepcopy(module)),
    "TaskOptimizer": lambda module: ga.TaskOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1), ga.GradientAgreement()
    ).step([module(torch.ones(2)), module(torch.zeros(2))]),
    "a list": lambda module: ga.TaskBatch([*module.parameters()], ga.Mean()),
}


class Phases(nn.Module):
    """Complex numbers: a parameter, or the pairs of real numbers that the message advises."""

    def __init__(self, as_pairs=False):
        super().__init__()
        z = torch.tensor([1 + 1j, 2 - 1j])
        self.z = nn.Parameter(torch.view_as_real(z).clone() if as_pairs else z)
        self.register_buffer("turn", torch.tensor(1j))  # complex buffers are the model's own

    def forward(self, x):
        z = torch.view_as_complex(self.z) if self.z.ndim == 2 else self.z
        return (self.turn * z - x).abs().square().sum()


@pytest.mark.parametrize("call", COMPLEX)
def test_complex_parameters_of_a_loop_are_refused_with_what_to_give(call):
    with pytest.raises(TypeError, match=r"found torch.complex64 in '(z|0)'; hold it as torch.view"):
        COMPLEX[call](Phases())
    if call != "Reptile":
        COMPLEX[call](Phases(as_pairs=True))


def test_pairs_of_real_numbers_have_the_gradient_of_the_complex_one():
    pairs, own = Phases(as_pairs=True), Phases()
    batch = ga.TaskBatch(pairs, ga.Mean())
    for x in (torch.ones(2), torch.tensor([2.0, -1.0])):
        batch.add(pairs(x))
        (own(x) / 2).backward()
    batch.backward()
    torch.testing.assert_close(torch.view_as_complex(pairs.z.grad), own.z.grad)


@pytest.mark.parametrize("engine", ["auto", "streamed"])
@pytest.mark.parametrize(
    "make", [nn.Embedding, lambda *a, **k: nn.EmbeddingBag(*a, mode="sum", **k)]
)
@pytest.mark.filterwarnings("ignore:There is a performance drop because")
def test_sparse_gradients_are_as_dense_ones(engine, make):
    tokens = torch.tensor([[[0, 1]], [[1, 2]], [[3, 3]]])
    updates = []
    for sparse in (True, False):
        torch.manual_seed(0)
        module = make(5, 2, sparse=sparse)

        def loss(params, batch, module=module):
            return functional_call(module, params, (batch,)).square().sum()

        params = {"weight": module.weight.detach()}
        agree = ga.GradientAgreement()
        updates.append(ga.aggregate_gradients(loss, params, tokens, agree, engine=engine).update)
    torch.testing.assert_close(updates[0], updates[1])


def test_torchopts_optimizers_take_sparse_gradients():
    pytest.importorskip("torchopt")
    from gradagree_opt.adapters.torchopt import weighted_loss

    weights = []
    for sparse in (True, False):
        torch.manual_seed(0)
        module = nn.Embedding(5, 2, sparse=sparse)
        losses = [module(torch.tensor([i])).square().sum() for i in range(3)]
        weights.append(weighted_loss(losses, module, ga.Mean()).aggregation.update)
    torch.testing.assert_close(weights[0], weights[1])
