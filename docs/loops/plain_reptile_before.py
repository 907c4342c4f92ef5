"""Reptile by hand on sine curves: learners are copies, the outer step goes towards their mean."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

TASKS = 8
SHOTS = 10
INNER_STEPS = 5
INNER_RATE = 0.02


def sample(draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one sine curve, ``[SHOTS, 1]``."""
    amplitude, phase = torch.rand(2, generator=draws)
    x = 10 * torch.rand(SHOTS, 1, generator=draws) - 5
    return x, (1 + amplitude) * torch.sin(x + math.pi * phase)


def adapt(model: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], float]:
    """Parameters of a copy after its inner steps, and its loss before the last of them."""
    learner = copy.deepcopy(model)
    inner = torch.optim.SGD(learner.parameters(), lr=INNER_RATE)
    for _ in range(INNER_STEPS):
        inner.zero_grad()
        loss = mse_loss(learner(x), y)
        loss.backward()
        inner.step()
    return {name: p.detach() for name, p in learner.named_parameters()}, loss.item()


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(iterations):
        adapted = [adapt(model, *sample(draws)) for _ in range(TASKS)]
        displacements = {
            name: torch.stack([p.detach() - after[name] for after, _ in adapted])
            for name, p in model.named_parameters()
        }
        update = {name: each.mean(0) for name, each in displacements.items()}
        for name, p in model.named_parameters():
            p.grad = update[name]
        optimizer.step()
        losses.append(sum(loss for _, loss in adapted) / TASKS)
    return losses


if __name__ == "__main__":
    print(*main(), sep="\n")
