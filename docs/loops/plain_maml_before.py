"""MAML by hand on sine curves: one inner step a task, the mean of the query losses backward."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

TASKS = 8
SHOTS = 10
INNER_RATE = 0.05

Batch = tuple[Tensor, Tensor]
Params = dict[str, Tensor]


def sample(draws: torch.Generator) -> tuple[Batch, Batch]:
    """Support and query set of one sine curve."""
    amplitude, phase = torch.rand(2, generator=draws)
    x = 10 * torch.rand(2, SHOTS, 1, generator=draws) - 5
    y = (1 + amplitude) * torch.sin(x + math.pi * phase)
    return (x[0], y[0]), (x[1], y[1])


def task_loss(model: nn.Module, params: Params, batch: Batch) -> Tensor:
    x, y = batch
    return mse_loss(functional_call(model, params, (x,)), y)


def adapt(model: nn.Module, support: Batch) -> Params:
    """Parameters after one inner step, still attached to the model's."""
    params = dict(model.named_parameters())
    loss = task_loss(model, params, support)
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    return {name: p - INNER_RATE * g for (name, p), g in zip(params.items(), grads, strict=True)}


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = [0.0] * iterations
    for iteration in range(iterations):
        total = torch.tensor(0.0)
        for _ in range(TASKS):
            support, query = sample(draws)
            adapted = adapt(model, support)
            loss = task_loss(model, adapted, query)
            total = total + loss / TASKS
            losses[iteration] += loss.item() / TASKS
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return losses


if __name__ == "__main__":
    print(*main(), sep="\n")
