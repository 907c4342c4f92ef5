"""Gradients of many tasks that nobody holds, against those that do."""

from functools import partial
from typing import Any

import torch
from gradagree_opt.adapters.torchjd import AgreementWeighting
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import mse_loss
from torchjd.autogram import Engine

import gradagree_opt as ga
from gradagree_opt.ablation.training.networks import mlp

from .maml import agreement
from .timing import Bar, Case, Contestant, Step

TASKS, POINTS, SIZES = 64, 10, [784, 1024, 1024, 1024, 10]
OURS, PLAIN, HELD = "gradagree, matrix_free", "backward of the mean loss", "torch.func by hand"

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


class Regression:
    """A network and its tasks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = mlp(SIZES, torch.nn.Tanh)
        self.tasks = (torch.randn(TASKS, POINTS, SIZES[0]), torch.randn(TASKS, POINTS, SIZES[-1]))
        self.params = {name: p.detach() for name, p in self.module.named_parameters()}

    def loss_fn(self, params: Params, batch: Batch) -> Tensor:
        return mse_loss(functional_call(self.module, params, (batch[0],)), batch[1])

    def task_losses(self) -> Tensor:
        """``[n]``, all examples in one forward pass."""
        x, y = self.tasks
        outputs = self.module(x.flatten(0, 1)).unflatten(0, (TASKS, POINTS))
        return (outputs - y).square().mean((1, 2))


def case() -> Case:
    problem = Regression()
    return Case(
        "matrix-free",
        f"{TASKS} tasks of {POINTS} points, MLP of "
        f"{sum(p.numel() for p in problem.params.values()) / 1e6:.1f} million parameters",
        [
            Contestant(OURS, partial(engine, problem, "matrix_free")),
            Contestant("gradagree, stacked", partial(engine, problem, "stacked")),
            Contestant("gradagree, streamed", partial(engine, problem, "streamed")),
            Contestant("gradagree, auto", partial(engine, problem, "auto")),
            Contestant(HELD, partial(by_hand, problem)),
            Contestant("TorchJD autogram", autogram),
            Contestant(PLAIN, partial(plain, problem), comparable=False),
        ],
        [
            Bar(OURS, HELD, 1 / 3.5),
            Bar(OURS, PLAIN, 2.6),
            Bar(OURS, HELD, 0.25, True),
            Bar(OURS, PLAIN, 1.4, True),
        ],
        rounds=11,
    )


def engine(problem: Regression, name: Any) -> Step:
    aggregator = ga.GradientAgreement()

    def step() -> Params:
        result = ga.aggregate_gradients(
            problem.loss_fn, problem.params, problem.tasks, aggregator, engine=name
        )
        update: Params = result.update
        return update

    return step


def by_hand(problem: Regression) -> Step:
    """vmap(grad) without this library."""
    per_task = vmap(grad(problem.loss_fn), in_dims=(None, 0))

    def step() -> Params:
        gradients = per_task(problem.params, problem.tasks)
        weights = agreement(torch.cat([leaf.flatten(1) for leaf in gradients.values()], 1))
        return {name: torch.tensordot(weights, leaf, 1) for name, leaf in gradients.items()}

    return step


def autogram() -> Step:
    """TorchJD's Gramian without a Jacobian, then a backward pass of the weighted losses."""
    problem = Regression()  # its hooks see every forward pass of the network
    gramian = Engine(problem.module, batch_dim=None)
    weighting = AgreementWeighting()

    def step() -> Params:
        losses = problem.task_losses()
        problem.module.zero_grad()
        losses.backward(weighting(gramian.compute_gramian(losses)))
        return {n: p.grad for n, p in problem.module.named_parameters() if p.grad is not None}

    return step


def plain(problem: Regression) -> Step:
    params = list(problem.module.parameters())
    return lambda: torch.autograd.grad(problem.task_losses().mean(), params)
