"""MAML with higher on Omniglot: 5 ways, 1 shot, the mean of the query losses backward."""

import os

import higher
import numpy as np
import torch
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
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28, 64),
        nn.ReLU(),
        nn.Linear(64, WAYS),
    )
    inner_optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    y = torch.arange(WAYS)
    losses = [0.0] * iterations
    for iteration in range(iterations):
        total = torch.tensor(0.0)
        for _ in range(TASKS):
            support, query = sample(images)
            with higher.innerloop_ctx(model, inner_optimizer, copy_initial_weights=False) as inner:
                learner, steps = inner
                for _ in range(INNER_STEPS):
                    steps.step(cross_entropy(learner(support), y))
                loss = cross_entropy(learner(query), y)
            total = total + loss / TASKS
            losses[iteration] += loss.item() / TASKS
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return losses


if __name__ == "__main__":
    print(*main(), sep="\n")
