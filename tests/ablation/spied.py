"""What a run draws for each split, and runs that differ in their test tasks alone."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import Params
from gradagree_opt.ablation.training.problem import Problem, Tasks
from gradagree_opt.ablation.training.run import Run, RunRecord
from gradagree_opt.ablation.training.training import train_runs
from gradagree_opt.tasks import TaskDistribution


class Spied:
    """A distribution that notes which tasks are drawn for which split."""

    def __init__(self, base: TaskDistribution, seen: dict[str, list[Tasks]]) -> None:
        self.base, self.seen = base, seen

    def sample(self, n_tasks: int, *, split: Any = "train", generator: torch.Generator) -> Tasks:
        tasks = self.base.sample(n_tasks, split=split, generator=generator)
        self.seen[split].append(tasks)
        return tasks


def trained(study: Study, problem: Problem) -> tuple[RunRecord, Params]:
    run = Run(method=study.methods[0], rate=0.5, seed=3)
    return train_runs(study, problem, [run], lambda _: None)[0]


def trained_alike(study: Study, clean: Problem, marked: Problem) -> tuple[RunRecord, RunRecord]:
    """The records of both, which are the same up to the test, as are the parameters."""
    (record, params), (found, params_of_marked) = trained(study, clean), trained(study, marked)
    assert (found.validation, found.curve) == (record.validation, record.curve)
    leaves = zip(tree_leaves(params), tree_leaves(params_of_marked), strict=True)
    assert all(torch.equal(leaf, of_marked) for leaf, of_marked in leaves)
    return record, found


def drawn(study: Study, problem: Problem) -> dict[str, list[Tasks]]:
    """The tasks of a whole run, tuning and test, by split."""
    seen: dict[str, list[Tasks]] = defaultdict(list)
    training, evaluation = (Spied(d, seen) for d in (problem.training, problem.evaluation))
    trained(study, replace(problem, training=training, evaluation=evaluation))
    return seen


def highest(batches: list[Tasks]) -> float:
    """The largest number in the examples of some tasks."""
    return max(float(x.max()) for tasks in batches for x, _ in tasks.values())
