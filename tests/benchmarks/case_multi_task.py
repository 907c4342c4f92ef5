"""Losses of one forward pass on a module, beside the plain step and a loop over their gradients."""

from functools import partial

import torch
from torch import Tensor, nn

import gradagree_opt as ga
from gradagree_opt.ablation.training.networks import mlp

from .maml import agreement
from .timing import Bar, Case, Contestant, Step

TASKS, POINTS, SIZES = 16, 256, [784, 1024, 1024, 1024]
OURS, MEAN, EQUAL = (f"gradagree, {name}" for name in ("agreement", "mean", "equal agreement"))
PLAIN, HELD = "step on the mean loss", "gradient of each task, by hand"


class Net(nn.Module):
    """A trunk and a head a task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = mlp(SIZES, nn.Tanh)
        self.heads = nn.ModuleList(nn.Linear(SIZES[-1], 10) for _ in range(TASKS))
        self.x, self.y = torch.randn(POINTS, SIZES[0]), torch.randn(TASKS, POINTS, 10)

    def losses(self) -> list[Tensor]:
        shared = torch.tanh(self.trunk(self.x))
        pairs = zip(self.heads, self.y, strict=True)
        return [(head(shared) - y).square().mean() for head, y in pairs]

    def take_gradients(self) -> dict[str, Tensor]:
        """``.grad`` by name, which is left empty: it counts among the memory of a step."""
        found = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        self.zero_grad()
        return found


def case() -> Case:
    size = sum(p.numel() for p in Net().parameters()) / 1e6
    return Case(
        "multi-task",
        f"{TASKS} losses of one forward pass of {POINTS} points, a trunk and heads of {size:.1f} "
        "million parameters, TaskOptimizer of SGD",
        [
            Contestant(OURS, partial(ours, ga.GradientAgreement())),
            Contestant(MEAN, partial(ours, ga.Mean()), comparable=False),
            Contestant(EQUAL, partial(ours, ga.EqualAgreement()), comparable=False),
            Contestant(HELD, by_hand),
            Contestant(PLAIN, plain, comparable=False),
        ],
        [
            Bar(OURS, PLAIN, 3),
            Bar(MEAN, PLAIN, 1.05),
            Bar(OURS, PLAIN, 3, True),
            Bar(MEAN, PLAIN, 1.05, True),
        ],
        rounds=7,
    )


def ours(aggregator: ga.Aggregator) -> Step:
    net = Net()
    optimizer = ga.TaskOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), aggregator)

    def step() -> dict[str, Tensor]:
        optimizer.step(net.losses())
        return net.take_gradients()

    return step


def by_hand() -> Step:
    """What is written without a library: a backward pass a task, all gradients as one matrix."""
    net = Net()
    params = [*net.parameters()]
    optimizer = torch.optim.SGD(params, lr=0.0)

    def step() -> dict[str, Tensor]:
        rows = []
        for loss in net.losses():
            grads = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        matrix = torch.stack(rows)
        update = (agreement(matrix) @ matrix).split([p.numel() for p in params])
        for parameter, part in zip(params, update, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
        return net.take_gradients()

    return step


def plain() -> Step:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def step() -> dict[str, Tensor]:
        torch.stack(net.losses()).mean().backward()
        optimizer.step()
        return net.take_gradients()

    return step
