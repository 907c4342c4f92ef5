"""Small regression tasks, TorchOpt's optimizers, and the loop over one task after the other."""

import torch
import torchopt
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

STEPS = 3
OPTIMIZERS = {
    "sgd": lambda: torchopt.sgd(lr=0.1),
    "momentum": lambda: torchopt.sgd(lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda: torchopt.sgd(lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda: torchopt.adam(lr=0.02),
    "adamw": lambda: torchopt.adamw(lr=0.02, weight_decay=0.1),
    "rmsprop": lambda: torchopt.rmsprop(lr=0.02, centered=True, momentum=0.5),
    "adagrad": lambda: torchopt.adagrad(lr=0.05),
    "adadelta": lambda: torchopt.adadelta(lr=0.5),
    "radam": lambda: torchopt.radam(lr=0.02),
    "adamax": lambda: torchopt.adamax(lr=0.02),
    "schedule": lambda: torchopt.sgd(
        lr=torchopt.schedule.exponential_decay(0.1, transition_begin=0, decay_rate=0.5)
    ),
}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def batches(n=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, n, 7, 2, generator=generator, dtype=torch.float64)
    shift = torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    y = torch.sin(x.sum(-1, keepdim=True)) + 2 + shift
    return tree_map(lambda t: t.to(dtype), {"support": (x[0], y[0]), "query": (x[1], y[1])})


def loss_of(net):
    def loss_fn(params, batch):
        x, y = batch
        return ((torch.func.functional_call(net, params, (x,)) - y) ** 2).mean()

    return loss_fn


def parameters_of(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def task(tasks, i):
    return tree_map(lambda leaf: leaf[i], tasks)


def flat(tree):
    return torch.cat([leaf.detach().flatten() for leaf in tree_leaves(tree)])


def assert_same(actual, expected, tolerance):
    actual, expected = flat(actual).double(), flat(expected).double()
    assert (actual - expected).norm() <= tolerance * expected.norm()


def naive_step(transformation, loss_fn, params, tasks, *, constant):
    """Displacements and meta-gradients of one task after the other, by autograd alone."""
    start = {name: p.clone().requires_grad_() for name, p in params.items()}
    displacements, gradients = [], []
    for i in range(len(tasks["query"][0])):
        at, state = start, transformation.init(params)
        for _ in range(STEPS):
            loss = loss_fn(at, task(tasks["support"], i))
            found = torch.autograd.grad(loss, list(at.values()), create_graph=not constant)
            decayed = {n: p.detach() for n, p in at.items()} if constant else at
            grads = dict(zip(at, found, strict=True))
            updates, state = transformation.update(grads, state, params=decayed, inplace=False)
            at = {name: p + updates[name] for name, p in at.items()}
        loss = loss_fn(at, task(tasks["query"], i))
        gradients.append(flat(torch.autograd.grad(loss, list(start.values()))))
        displacements.append(flat(start) - flat(at))
    return torch.stack(displacements), torch.stack(gradients)
