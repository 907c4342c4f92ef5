"""What every meta-algorithm answers with, and how its tasks are checked."""

from typing import NamedTuple

from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregation, CollectedTasks
from gradagree_opt.core.diagnostics import Diagnostics
from gradagree_opt.core.stacks import PyTree, check_floating, task_count


class MetaStep(NamedTuple):
    """One outer step over n tasks.

    Attributes:
        update: a descent gradient, a pytree like the (meta-)parameters: what an optimizer
            subtracts. Nothing is changed until it does.
        losses: ``[n]``, of every task after adaptation.
        weights: ``[n]``, or ``[groups, n]`` where the scope is not "global".
        scores: what the weights come from.
        diagnostics: plain tensors that say how the tasks agreed.
        engine: name of the engine that ran.
    """

    update: PyTree
    losses: Float[Tensor, " n"]
    weights: Float[Tensor, "*groups n"]
    scores: Float[Tensor, "*groups n"]
    diagnostics: Diagnostics
    engine: str


def meta_step(
    aggregation: Aggregation | CollectedTasks, losses: Tensor, engine: str, /
) -> MetaStep:
    """The aggregation with the losses of its tasks and the engine that ran."""
    return MetaStep(
        aggregation.update,
        losses.detach(),
        aggregation.weights,
        aggregation.scores,
        aggregation.diagnostics,
        engine,
    )


def check_tasks(params: PyTree, tasks: PyTree, /, *sets: str) -> int:
    """Number of tasks, or one sentence unless the tasks hold the named sets.

    Raises:
        TypeError: a parameter is not floating-point, or the tasks are not a dict.
        ValueError: a set is missing, or the task axes differ or are empty.
    """
    check_floating(params, "parameters")
    if not isinstance(tasks, dict):
        raise TypeError(
            f"expected tasks as {{'support': batch, 'query': batch}}, found "
            f"{type(tasks).__name__}; give every leaf the task axis first"
        )
    for name in sets:
        if name not in tasks:
            raise ValueError(
                f"expected tasks with a {name!r} set, found {sorted(map(str, tasks))}; "
                "tasks are {'support': batch, 'query': batch}"
            )
    return task_count(tasks, "tasks")
