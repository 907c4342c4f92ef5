"""What every meta-algorithm answers with, and how its tasks are checked."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from gradagree_opt.aggregation import Aggregation
from gradagree_opt.annotations import Float
from gradagree_opt.diagnostics import Diagnostics
from gradagree_opt.stacks import PyTree, check_floating, task_count

Step = TypeVar("Step", bound=Callable[..., Any])


class MetaStep(NamedTuple):
    """One outer step over n tasks.

    Attributes:
        update: a descent gradient, a pytree like the (meta-)parameters: what an optimizer
            subtracts. Nothing is changed until it does.
        losses: ``[n]``, of every task after adaptation.
        weights: ``[n]``, or ``[groups, n]`` where the scope is not "global".
        scores: what the weights come from.
        diagnostics: plain tensors that say how the tasks agreed.
    """

    update: PyTree
    losses: Float[Tensor, " n"]
    weights: Float[Tensor, "*groups n"]
    scores: Float[Tensor, "*groups n"]
    diagnostics: Diagnostics


def meta_step(aggregation: Aggregation, losses: Tensor, /) -> MetaStep:
    """The aggregation with the losses of its tasks."""
    return MetaStep(
        aggregation.update,
        losses.detach(),
        aggregation.weights,
        aggregation.scores,
        aggregation.diagnostics,
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


def maybe_compiled(step: Step, compile: bool, /) -> Step:
    """The function, compiled as one graph of static shapes where asked for."""
    if not compile:
        return step
    # An ablation hands one step many aggregators, each a compilation; older torch stops at 8.
    takes_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": 64} if takes_limit else {}
    return cast(Step, torch.compile(step, fullgraph=True, dynamic=False, **limit))
