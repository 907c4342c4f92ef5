"""Which leaves share one weight a task: all of them, each by itself, or groups by name."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor
from torch.utils._pytree import tree_structure

from gradagree_opt.annotations import Bool
from gradagree_opt.core.measuring import measure, measure_groups
from gradagree_opt.core.stacks import PyTree, check_stack, leaf_paths
from gradagree_opt.core.statistics import Statistics

Scope = Literal["global", "leaf"] | Callable[[str], str]


def group_indices(signal: PyTree, scope: Scope, /) -> list[int] | None:
    """Index of the group of every leaf, in order of appearance; None for the global scope.

    >>> import torch
    >>> stack = {"body.w": torch.zeros(1), "head.w": torch.zeros(1), "head.b": torch.zeros(1)}
    >>> group_indices(stack, lambda path: path.split(".")[0])
    [0, 1, 1]
    """
    if scope == "global":
        return None
    paths = leaf_paths(signal)
    if scope == "leaf":
        return list(range(len(paths)))
    names = [scope(path) for path in paths]
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return [order[name] for name in names]


def by_group(leaves: Sequence[Tensor], groups: list[int] | None, /) -> list[list[Tensor]]:
    """The leaves of each group."""
    if groups is None:
        return [list(leaves)]
    members: list[list[Tensor]] = [[] for _ in range(max(groups) + 1)]
    for leaf, group in zip(leaves, groups, strict=True):
        members[group].append(leaf)
    return members


def check_signal(signal: PyTree, directions: PyTree, n: int, scope: Scope, /) -> None:
    """Raises a ValueError or TypeError unless the signal is that of the n directions."""
    n_signal = check_stack(signal, "signal", least=min(n, 1))
    if n_signal != n:
        raise ValueError(
            f"expected one signal for each of the {n} directions, found {n_signal}; "
            "both need the same tasks in the same order"
        )
    if scope != "global" and tree_structure(signal) != tree_structure(directions):
        raise ValueError(
            f"expected signal and directions of one structure for scope={scope!r}, found "
            "two; give both the same leaves, or take scope='global'"
        )


def measure_by_group(
    leaves: Sequence[Tensor],
    groups: list[int] | None,
    active: Bool[Tensor, " n"],
    needs: frozenset[str],
    /,
    *,
    scaled: bool,
) -> Statistics:
    """Statistics of task-stacked signals, one row for each group where there are groups.

    Args:
        leaves: task-stacked tensors without a graph.
        groups: result of :func:`group_indices`.
        active: the tasks that may get a weight.
        needs: names of the optional statistics.
        scaled: as in :func:`~gradagree_opt.core.measuring.measure`.
    """
    if groups is None:
        return measure(leaves, active, needs, scaled=scaled)
    return measure_groups(by_group(leaves, groups), active, needs, scaled=scaled)
