"""MAML with TorchOpt's differentiable SGD on sine curves."""

import math

import torch
import torchopt
from torch import Tensor, nn
from torch.nn.functional import mse_loss

TASKS = 8
SHOTS = 10
INNER_STEPS = 3
INNER_RATE = 0.05

Batch = tuple[Tensor, Tensor]


def sample(draws: torch.Generator) -> tuple[Batch, Batch]:
    """Support and query set of one sine curve."""
    amplitude, phase = torch.rand(2, generator=draws)
    x = 10 * torch.rand(2, SHOTS, 1, generator=draws) - 5
    y = (1 + amplitude) * torch.sin(x + math.pi * phase)
    return (x[0], y[0]), (x[1], y[1])


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    inner = torchopt.MetaSGD(net, lr=INNER_RATE)
    outer = torch.optim.Adam(net.parameters(), lr=0.003)
    losses = [0.0] * iterations
    for iteration in range(iterations):
        total = torch.zeros(())
        net_state = torchopt.extract_state_dict(net)
        inner_state = torchopt.extract_state_dict(inner)
        for _ in range(TASKS):
            (x, y), (query_x, query_y) = sample(draws)
            for _ in range(INNER_STEPS):
                inner.step(mse_loss(net(x), y))
            loss = mse_loss(net(query_x), query_y)
            total = total + loss / TASKS
            losses[iteration] += loss.item() / TASKS
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(inner, inner_state)
        outer.zero_grad()
        total.backward()
        outer.step()
    return losses


if __name__ == "__main__":
    print(*main(), sep="\n")  # noqa: T201
