"""What every meta-algorithm answers with, and how its tasks are checked."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from gradagree_opt.core.stacks import PyTree, check_floating, task_count
from gradagree_opt.engines.choice import AggregatedGradients

MetaStep: TypeAlias = AggregatedGradients
"""One outer step over n tasks."""
LearnerLoss = Callable[[Any, PyTree], Tensor]
"""``loss_fn(learner, batch) -> scalar`` of one task, of the learners of a framework."""


def check_tasks(params: PyTree, tasks: PyTree, /, *sets: str, least: int) -> int:
    """The number of tasks, ``least`` or more, which have to hold the named sets.

    Raises:
        TypeError: a parameter is not floating-point, or the tasks are not a dict.
        ValueError: a set is missing, or the task axes differ or are empty.
    """
    check_floating(params, "parameters")
    if not isinstance(tasks, dict):
        raise TypeError(
            f"expected tasks as {{'support': batch, 'query': batch}}, found "
            f"{type(tasks).__name__}; give every leaf the task axis first, as torch.stack(…) over "
            "the tasks does"
        )
    for name in sets:
        if name not in tasks:
            raise ValueError(
                f"expected tasks with a {name!r} set, found {sorted(map(str, tasks))}; "
                "tasks are {'support': batch, 'query': batch}"
            )
    return task_count(tasks, "tasks", least=least)
