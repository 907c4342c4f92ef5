"""Inner loops by higher, and its loop over a meta-batch with TaskBatch in it."""

import higher
import torch

import gradagree_opt as ga

from .learners import RATE, STEPS, each, mse, vector

INNER = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
}


def adapted(net, inner, task, first_order, **options):
    """A functional module after its inner steps."""
    options = {"copy_initial_weights": False} | options
    with higher.innerloop_ctx(net, inner, track_higher_grads=not first_order, **options) as (
        learner,
        steps,
    ):
        for _ in range(STEPS):
            steps.step(mse(learner, task["support"]))
    return learner


def loop(net, inner, tasks, aggregator, *, first_order=False, memory="graph"):
    batch = ga.TaskBatch(net, aggregator, memory=memory)
    for task in each(tasks):
        learner = adapted(net, inner, task, first_order)
        batch.add(mse(learner, task["query"]), adapted=learner)
    return batch.backward()


def one_by_one(net, inner, tasks, first_order):
    """Displacement and gradient of one task after the other, the way higher's users take them."""
    displacements, gradients = [], []
    for task in each(tasks):
        learner = adapted(net, inner, task, first_order)
        at = [*learner.parameters()] if first_order else [*net.parameters()]
        gradients.append(vector(torch.autograd.grad(mse(learner, task["query"]), at)))
        displacements.append(vector(net.parameters()) - vector(learner.parameters()))
    return torch.stack(displacements), torch.stack(gradients)
