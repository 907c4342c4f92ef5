"""Second-order MAML with a convolutional network in the sizes of Omniglot 5-way 1-shot."""

from functools import partial

import torch
from torch.nn.functional import cross_entropy

import gradagree_opt as ga
from gradagree_opt.ablation.training.networks import conv4

from . import maml, maml_in_jax
from .timing import Bar, Case, Contestant, Step

TASKS, WAYS, SHOTS, QUERIES = 8, 5, 1, 15
OURS, MEAN = "gradagree, compiled", "gradagree, compiled, mean"
EQUAL = "gradagree, compiled, Equal Agreement"
CHUNKED = "gradagree, compiled, chunk_size=2"
PLAIN = "one plain forward and backward pass"


def case() -> Case:
    torch.manual_seed(0)
    module = conv4(64, WAYS, "nichol")
    tasks = {"support": drawings(SHOTS), "query": drawings(QUERIES)}
    problem = maml.Problem(module, cross_entropy, tasks, 0.4, "displacement")
    others = {
        MEAN: ga.Mean(nonfinite="propagate"),
        EQUAL: ga.EqualAgreement(nonfinite="propagate"),
    }
    return Case(
        "omniglot-maml",
        "Omniglot MAML: second order, 8 tasks 5-way 1-shot with 15 queries a class, one inner "
        "step, conv-4 of 64 filters, stride 2, BatchNorm (noise in place of drawings)",
        [
            *maml.contestants(problem),
            maml_in_jax.contestant(problem, maml_in_jax.conv4, maml_in_jax.cross_entropy),
            Contestant(CHUNKED, partial(maml.gradagree, problem, compile=True, chunk_size=2)),
            *[
                Contestant(
                    name,
                    partial(maml.gradagree, problem, compile=True, aggregator=aggregator),
                    comparable=False,
                )
                for name, aggregator in others.items()
            ],
            Contestant(PLAIN, partial(plain_pass, problem), comparable=False),
        ],
        [
            *[
                Bar(ours, other, bound)
                for ours in (OURS, CHUNKED)
                for other, bound in (("learn2learn", 0.5), (PLAIN, 1.3), ("jax.jit", 1.0))
            ],
            Bar(OURS, MEAN, 1.05),
            Bar(EQUAL, OURS, 1.05),
        ],
        tolerance=1e-2,  # BatchNorm of five examples enlarges rounding
        rounds=11,
    )


def drawings(shots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise in the shape of drawings, shuffled labels."""
    x = torch.rand(TASKS, WAYS * shots, 1, 28, 28)
    y = torch.arange(WAYS).repeat(shots).expand(TASKS, -1)
    return x, y[:, torch.randperm(WAYS * shots)]


def plain_pass(problem: maml.Problem) -> Step:
    """The images of all tasks through one network, channels last."""
    module = problem.module.to(memory_format=torch.channels_last)
    parts = [problem.tasks["support"], problem.tasks["query"]]
    x = torch.cat([x.flatten(0, 1) for x, _ in parts])
    y = torch.cat([y.flatten() for _, y in parts])
    x = x.contiguous(memory_format=torch.channels_last)
    params = list(module.parameters())
    return lambda: torch.autograd.grad(problem.criterion(module(x), y), params)
