"""MAML with TorchOpt's differentiable SGD on Omniglot: 5 ways, 1 shot."""

import os

import numpy as np
import torch
import torchopt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

TASKS = 8
WAYS = 5
INNER_STEPS = 2


def omniglot(data: str | None) -> Tensor:
    """Characters to train on, ``[characters, drawings, 28, 28]``."""
    with np.load(data or os.environ["GRADAGREE_OMNIGLOT"]) as archive:
        images = torch.from_numpy(archive["images"][archive["vinyals_split"] == 0])
    return images / 255


def sample(images: Tensor) -> tuple[Tensor, Tensor]:
    """One drawing of every class to adapt to, and one to evaluate on."""
    characters = torch.randperm(len(images))[:WAYS]
    drawings = torch.rand(WAYS, images.shape[1]).argsort()
    return images[characters, drawings[:, 0]], images[characters, drawings[:, 1]]


def main(iterations: int = 200, data: str | None = None) -> list[float]:
    torch.manual_seed(0)
    images = omniglot(data)
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28, 64),
        nn.ReLU(),
        nn.Linear(64, WAYS),
    )
    inner = torchopt.MetaSGD(net, lr=0.4)
    outer = torch.optim.Adam(net.parameters(), lr=0.01)
    y = torch.arange(WAYS)
    losses = [0.0] * iterations
    for iteration in range(iterations):
        total = torch.tensor(0.0)
        net_state = torchopt.extract_state_dict(net)
        inner_state = torchopt.extract_state_dict(inner)
        for _ in range(TASKS):
            support, query = sample(images)
            for _ in range(INNER_STEPS):
                inner.step(cross_entropy(net(support), y))
            loss = cross_entropy(net(query), y)
            total = total + loss / TASKS
            losses[iteration] += loss.item() / TASKS
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(inner, inner_state)
        outer.zero_grad()
        total.backward()
        outer.step()
    return losses


if __name__ == "__main__":
    print(*main(), sep="\n")
