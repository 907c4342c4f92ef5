"""Task distributions in float64."""

from dataclasses import replace
from typing import Any

import torch

from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.problem import Problem, Tasks, build_problem
from gradagree_opt.tasks import TaskDistribution


class Doubled:
    """A distribution in float64, in which two ways to compute one thing hardly part."""

    def __init__(self, base: TaskDistribution) -> None:
        self.base = base

    def sample(self, n_tasks: int, *, split: Any = "train", generator: torch.Generator) -> Tasks:
        tasks = self.base.sample(n_tasks, split=split, generator=generator)
        return {part: (x.double(), y.double()) for part, (x, y) in tasks.items()}


def problem_of(study: Study) -> Problem:
    """That of a study, its tasks in float64."""
    problem = build_problem(study, None)
    return replace(
        problem, training=Doubled(problem.training), evaluation=Doubled(problem.evaluation)
    )
