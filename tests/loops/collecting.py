"""Tasks for TaskBatch: inner loops of torch.autograd, and the step that they should give."""

from functools import partial

import pytest
import torch
from torch import nn

import gradagree_opt as ga

from ..meta.loops import descend, gradient, gradient_with_graph
from ..meta.problems import assert_same, loss_fn, problem
from ..meta.rules import by_layer

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
        ga.EqualAgreement,
        partial(ga.EqualAgreement, scope=by_layer, match_norm="mean"),
    ],
    ids=[
        *("mean", "sum", "agreement", "leaf", "layer", "drop", "propagate", "random"),
        *("equal", "equal, layer"),
    ],
)


class Network(nn.Module):
    """The parameters of a problem as a module."""

    def __init__(self, params):
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


def parameters(module):
    return dict(module.named_parameters())


def adapt(params, support, first_order=False):
    """Inner loop attached to the parameters, through the gradients or past them."""
    inner = partial(gradient if first_order else gradient_with_graph, loss_fn, batch=support)
    return descend(inner, params, dict.fromkeys(params, LR), STEPS)[-1]


def add_maml_tasks(batch, module, container=dict, first_order=False, case=CASE):
    for task in case.each():
        adapted = adapt(parameters(module), task["support"], first_order)
        batch.add(loss_fn(adapted, task["query"]), adapted=container(adapted))


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
    torch.testing.assert_close(
        result.scores, expected.scores, rtol=1e-11, atol=1e-14, equal_nan=True
    )
