"""Task distributions in float64."""

from typing import Any

import torch

from gradagree_opt.ablation.training.problem import Tasks
from gradagree_opt.tasks import TaskDistribution


class Doubled:
    """A distribution in float64, in which two ways to compute one thing hardly part."""

    def __init__(self, base: TaskDistribution) -> None:
        self.base = base

    def sample(self, n_tasks: int, *, split: Any = "train", generator: torch.Generator) -> Tasks:
        tasks = self.base.sample(n_tasks, split=split, generator=generator)
        return {part: (x.double(), y.double()) for part, (x, y) in tasks.items()}
