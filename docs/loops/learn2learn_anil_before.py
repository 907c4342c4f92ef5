"""ANIL with learn2learn on Omniglot: the body is trained, but only the head adapts to a task."""

import os
import random

import learn2learn as l2l
import numpy as np
import torch
from learn2learn.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

TASKS = 8
WAYS = 5
SHOTS = 1
INNER_RATE = 0.4
INNER_STEPS = 3


def omniglot(data: str | None) -> l2l.data.Taskset:
    """Tasks of characters to train on, as many drawings to adapt to as to evaluate on."""
    with np.load(data or os.environ["GRADAGREE_OMNIGLOT"]) as archive:
        images = torch.from_numpy(archive["images"][archive["vinyals_split"] == 0])
    labels = torch.arange(len(images)).repeat_interleave(images.shape[1])
    dataset = l2l.data.MetaDataset(TensorDataset(images.flatten(0, 1) / 255, labels))
    transforms = [
        FusedNWaysKShots(dataset, n=WAYS, k=2 * SHOTS),
        LoadData(dataset),
        RemapLabels(dataset),
        ConsecutiveLabels(dataset),
    ]
    return l2l.data.Taskset(dataset, transforms)


def main(iterations: int = 200, data: str | None = None) -> list[float]:
    random.seed(0)
    torch.manual_seed(0)
    tasks = omniglot(data)
    body = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 64), nn.ReLU())
    head = l2l.algorithms.MAML(nn.Linear(64, WAYS), lr=INNER_RATE)
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.003)
    losses = [0.0] * iterations
    for iteration in range(iterations):
        total = torch.tensor(0.0)
        for _ in range(TASKS):
            learner = head.clone()
            x, y = tasks.sample()
            features = body(x)
            for _ in range(INNER_STEPS):
                learner.adapt(cross_entropy(learner(features[::2]), y[::2]))
            loss = cross_entropy(learner(features[1::2]), y[1::2])
            total = total + loss / TASKS
            losses[iteration] += loss.item() / TASKS
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return losses


if __name__ == "__main__":
    print(*main(), sep="\n")
