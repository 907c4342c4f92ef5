"""The complete training loop of MAML, FOMAML, Meta-SGD and Reptile, short enough to copy."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch.utils._pytree import tree_leaves, tree_map

from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.diagnostics import check_some_task
from gradagree_opt.core.stacks import PyTree, check_floating, leaf_paths
from gradagree_opt.loops.accumulation import run_accumulation_hooks
from gradagree_opt.loops.adapted import trained
from gradagree_opt.loops.task_optimizer import check_optimizer
from gradagree_opt.meta import MetaStep

__all__ = ["train"]

TaskSource = Callable[[int], PyTree]
"""From the number of the iteration to its task-stacked tasks."""
Callback = Callable[[int, MetaStep], bool | None]
"""Called after every outer step; True ends the training."""


@runtime_checkable
class MetaAlgorithm(Protocol):
    """What :class:`gradagree_opt.MAML`, ``MetaSGD`` and ``Reptile`` have in common."""

    def step(self, params: PyTree, tasks: PyTree, aggregator: Aggregator, /) -> MetaStep:
        """One outer step, without changing the parameters."""


def train(
    meta: MetaAlgorithm,
    params: PyTree,
    task_source: TaskSource,
    optimizer: torch.optim.Optimizer,
    aggregator: Aggregator,
    /,
    *,
    iterations: int,
    callback: Callback | None = None,
) -> PyTree:
    """Trains the parameters in place for a number of outer steps.

    Args:
        meta: the meta-algorithm.
        params: pytree of the tensors that the optimizer holds; one that no task uses has a zero
            gradient.
        task_source: from an iteration to ``{"support": batch, "query": batch}``, leaves
            ``[n, *shape]``.
        optimizer: the outer optimizer, over the leaves of ``params``.
        aggregator: what weights the tasks.
        iterations: outer steps.
        callback: called with the iteration and its :class:`MetaStep` after the outer step; return
            True to stop. A learning-rate scheduler steps here.

    Returns:
        The same parameters, trained.

    Raises:
        TypeError: the parameters are no tensors, the task source is no function, or the optimizer
            is none that steps on ``.grad``.
        ValueError: a parameter is frozen or occurs twice, the optimizer does not hold them all, or
            a batch is refused or has no finite task; the parameters are as the last good step left
            them.

    >>> import gradagree_opt as ga
    >>> w = torch.tensor(0.0, requires_grad=True)
    >>> maml = ga.MAML(lambda w, x: ((w - x) ** 2).mean(), ga.InnerSGD(lr=0.25, steps=1))
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> train(maml, w, lambda _: {"support": x, "query": x}, torch.optim.SGD([w], lr=1.0),
    ...       ga.Mean(), iterations=20)
    tensor(2.0000, requires_grad=True)
    """
    check_floating(params, "parameters")
    check_optimizer(optimizer)
    if not callable(task_source):
        raise TypeError(
            f"expected a function from the iteration to its tasks, found "
            f"{type(task_source).__name__}; give lambda iteration: tasks"
        )
    leaves = tree_leaves(params)
    by_path = dict(zip(leaf_paths(params), leaves, strict=True))
    for path, leaf in by_path.items():
        if not leaf.requires_grad:
            found = repr(path) if path else "one"
            raise ValueError(
                f"expected params that require a gradient, found {found} frozen; keep it "
                "out of params and let loss_fn add it, or call requires_grad_() to train it"
            )
    trained(by_path)  # raises where one is tied to another
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not all(id(leaf) in held for leaf in leaves):
        raise ValueError(
            "expected an optimizer over the leaves of params, found one that lacks some; "
            "build it as torch.optim.SGD(tree_leaves(params), lr=…)"
        )
    for iteration in range(iterations):
        detached = tree_map(torch.Tensor.detach, params)
        result = meta.step(detached, task_source(iteration), aggregator)
        check_some_task(result.diagnostics, aggregator.nonfinite)
        for leaf, update in zip(leaves, tree_leaves(result.update), strict=True):
            leaf.grad = update
            run_accumulation_hooks(leaf)
        optimizer.step()
        if callback is not None and callback(iteration, result):
            break
    return params
