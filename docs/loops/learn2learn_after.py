"""MAML with learn2learn on Omniglot: 5 ways, 1 shot, the mean of the query losses backward."""

import os
import random

import learn2learn as l2l
import numpy as np
import torch
from learn2learn.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import gradagree_opt as ga

TASKS = 8
WAYS = 5
SHOTS = 1
INNER_RATE = 0.4
INNER_STEPS = 2


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


def query_loss(learner: l2l.algorithms.MAML, task: tuple[Tensor, Tensor]) -> Tensor:
    """Loss on every second drawing, after adaptation to the others."""
    x, y = task
    for _ in range(INNER_STEPS):
        learner.adapt(cross_entropy(learner(x[::2]), y[::2]))
    return cross_entropy(learner(x[1::2]), y[1::2])


def main(iterations: int = 200, data: str | None = None) -> list[float]:
    random.seed(0)
    torch.manual_seed(0)
    tasks = omniglot(data)
    model = l2l.vision.models.OmniglotFC(28 * 28, WAYS, sizes=[64, 64])
    maml = l2l.algorithms.MAML(model, lr=INNER_RATE)
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.003)
    losses = [0.0] * iterations
    for iteration in range(iterations):
        total = ga.TaskBatch(maml, ga.GradientAgreement())
        for _ in range(TASKS):
            learner = maml.clone()
            loss = query_loss(learner, tasks.sample())
            total.add(loss, adapted=learner)
            losses[iteration] += loss.item() / TASKS
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return losses


if __name__ == "__main__":
    print(*main(), sep="\n")
