"""Inputs that scripts have: they are taken, or one sentence says what to give instead."""

from collections import UserDict
from dataclasses import dataclass

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
    [0.25, torch.tensor(0.25), np.float32(0.25), np.float64(0.25), np.array(0.25)],
    ids=["float", "tensor", "float32", "float64", "array"],
)
def test_an_inner_rate_is_any_number(rate, without_type_checks):
    params = {"a": torch.tensor(0.0), "b": torch.zeros(2)}

    def loss(params, x):
        return loss_fn(params["a"], x) + loss_fn(params["b"], x)

    expected = ga.MAML(loss, ga.InnerSGD(0.25, 1)).step(params, TASKS, ga.Mean())
    found = ga.MAML(loss, ga.InnerSGD(rate, 1)).step(params, TASKS, ga.Mean())
    torch.testing.assert_close(found.update, expected.update)


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
    torchopt = pytest.importorskip("torchopt")
    weights = []
    for sparse in (True, False):
        torch.manual_seed(0)
        module = nn.Embedding(5, 2, sparse=sparse)
        losses = [module(torch.tensor([i])).square().sum() for i in range(3)]
        params = tuple(module.parameters())
        optimizer = ga.TaskOptimizer(torchopt.FuncOptimizer(torchopt.sgd(lr=0.1)), ga.Mean())
        weights.append(optimizer.functional_step(losses, params).aggregation.update)
    torch.testing.assert_close(weights[0], weights[1])
