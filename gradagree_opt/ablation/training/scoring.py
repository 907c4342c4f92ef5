"""What trained parameters are worth: scores and agreement of a group of runs on their own tasks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.training.grouping import select, stack
from gradagree_opt.ablation.training.networks import Criterion, Params
from gradagree_opt.ablation.training.problem import Problem, agreement_matrix, scores_after
from gradagree_opt.core.stacks import PyTree

NUMBERS_AT_ONCE = 2**26
"""In the tasks of the runs that a GPU tests at once."""


def scores_of_runs(
    problem: Problem, judge: Criterion, params: Params, tasks: Sequence[PyTree], steps: list[int]
) -> dict[int, Tensor]:
    """The mean score of each run on its tasks: for each number of gradient steps ``[runs]``.

    Args:
        params: Leaves ``[runs, *shape]``.
        tasks: Of each run.
    """

    def means(own: Params, of_run: Any) -> dict[int, Tensor]:
        scores = scores_after(problem, judge, own, of_run, steps)
        return {step: values.mean() for step, values in scores.items()}

    found: dict[int, Tensor] = each_run(problem, means, params, tasks)
    return found


def check_untrained(loss: float, steps: int, seed: int) -> None:
    """Raises a StudyError where the validation loss is not finite before the first outer step.

    No method has had a part in it, so that none has diverged.
    """
    if not math.isfinite(loss):
        raise StudyError(
            f"the validation tasks of seed {seed}: expected a finite loss of the untrained network "
            f"after {steps} gradient step{'s' * (steps != 1)}, found {loss}; correct the tasks or "
            "the network, or take a smaller inner lr"
        )


def matrices_of_runs(problem: Problem, params: Params, tasks: Sequence[PyTree]) -> Tensor:
    """The agreement matrices ``[runs, n, n]`` of a batch of training tasks each."""
    matrices: Tensor = each_run(
        problem, lambda own, batch: agreement_matrix(problem, own, batch["support"]), params, tasks
    )
    return matrices


def each_run(problem: Problem, function: Any, params: Params, tasks: Sequence[PyTree]) -> Any:
    """The function of each run's parameters and tasks, its results stacked.

    A CPU does one run after the other, a GPU as many together as have room.
    """
    if problem.device.type == "cpu":
        return stack([function(select(params, row), own) for row, own in enumerate(tasks)])
    return together(function, params, tasks)


def together(function: Any, params: Params, tasks: Sequence[PyTree]) -> Any:
    """As :func:`each_run`, vmapped over some runs at a time."""
    numbers = max(1, sum(leaf.numel() for leaf in tree_leaves(tasks[0])))
    at_once = max(1, NUMBERS_AT_ONCE // numbers)
    parts = []
    for first in range(0, len(tasks), at_once):
        rows = slice(first, first + at_once)
        some = tree_map(lambda leaf, rows=rows: leaf[rows], params)
        parts.append(torch.vmap(function)(some, stack(list(tasks[rows]))))
    return tree_map(lambda *leaves: torch.cat(leaves), *parts)
