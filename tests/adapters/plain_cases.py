"""Sines for plain.train, a small network, and the meta-algorithms that train it."""

import math

import pytest
import torch
from gradagree_opt.adapters import plain
from torch.utils._pytree import tree_leaves

import gradagree_opt as ga
from gradagree_opt.tasks import Sine

INNER = ga.InnerSGD(0.05, 3)
SINE = Sine(amplitude=(0.5, 2.0), phase=(0.0, math.pi / 2), x_range=(-2.0, 2.0), support_shots=10)


def network(seed, hidden=20):
    """1 – hidden – 1, as leaves that an optimizer can hold."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        "weight1": torch.randn(1, hidden, generator=generator),
        "bias1": torch.randn(hidden, generator=generator),
        "weight2": torch.randn(hidden, 1, generator=generator) / math.sqrt(hidden),
        "bias2": torch.zeros(1),
    }
    return {name: p.requires_grad_() for name, p in params.items()}


def loss_fn(params, batch):
    x, y = batch
    hidden = torch.tanh(x @ params["weight1"] + params["bias1"])
    return ((hidden @ params["weight2"] + params["bias2"] - y) ** 2).mean()


def sines(iteration, n=8):
    return SINE.sample(n, generator=torch.Generator().manual_seed(iteration))


META = {
    "MAML": ga.MAML(loss_fn, INNER),
    "FOMAML": ga.MAML(loss_fn, INNER, first_order=True),
    "Reptile": ga.Reptile(loss_fn, INNER),
}
each_meta = pytest.mark.parametrize("meta", META.values(), ids=META)


def run(meta, params):
    """Three outer steps of Gradient Agreement."""
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.05)
    return plain.train(meta, params, sines, optimizer, ga.GradientAgreement(), iterations=3)
