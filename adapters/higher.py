"""higher: its inner loop over the tasks of a meta-batch, with any optimizer it differentiates.

A loop over ``innerloop_ctx`` needs nothing from here: :class:`gradagree_opt.TaskBatch` takes the
functional modules.
"""

from typing import Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map

from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.engines.losses import ScalarLoss
from gradagree_opt.frameworks import require
from gradagree_opt.loops.graphs import check_depends
from gradagree_opt.loops.task_batch import TaskBatch
from gradagree_opt.meta.steps import LearnerLoss, MetaStep, check_tasks
from gradagree_opt.options import check_count

require("higher")

import higher  # noqa: E402 - after require, whose error names the install command

__all__ = ["meta_step"]


def meta_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LearnerLoss,
    tasks: PyTree,
    aggregator: Aggregator,
    /,
    *,
    steps: int = 1,
    first_order: bool = False,
    memory: Literal["graph", "stream"] = "graph",
) -> MetaStep:
    """``innerloop_ctx`` for one task after the other, their aggregation added to ``.grad``.

    Args:
        model: the module to train; the learners have copies of its buffers.
        optimizer: inner optimizer over its parameters, each task starting from its state.
        loss_fn: ``loss_fn(learner, batch) -> scalar`` of one task.
        tasks: ``{"support": batch, "query": batch}`` with leaves ``[n, *shape]``.
        aggregator: what weights the tasks, by their displacements or, as Equal Agreement, by their
            meta-gradients: see the signal of :class:`gradagree_opt.MAML`.
        steps: inner steps, each on the whole support set.
        first_order: ``track_higher_grads=False``, and the gradient taken where a learner stands.
        memory: as in :class:`gradagree_opt.TaskBatch`.

    Returns:
        The update by name of the parameter, the losses after adaptation and the weights.

    Raises:
        TypeError: the model is no module, or the inner optimizer none of torch.optim.
        ValueError: the tasks are not task-stacked, there is no inner step, the loss is not a
            scalar or does not depend on the learner, the inner optimizer holds parameters of
            another model or, in first order, a frozen one, or the aggregator refuses the tasks.
            Nothing is changed then.

    Source: Eshratifar et al. 2018, algorithm 1, the MAML form.

    >>> import gradagree_opt as ga
    >>> net = nn.Linear(1, 1)
    >>> x = torch.rand(4, 10, 1)
    >>> tasks = {"support": (x[:, ::2], x[:, ::2]), "query": (x[:, 1::2], x[:, 1::2])}
    >>> def loss_fn(learner, batch):
    ...     return ((learner(batch[0]) - batch[1]) ** 2).mean()
    >>> adam = torch.optim.Adam(net.parameters(), lr=0.1)
    >>> result = meta_step(net, adam, loss_fn, tasks, ga.GradientAgreement(), steps=2)
    >>> net.weight.grad.shape, result.losses.shape
    (torch.Size([1, 1]), torch.Size([4]))
    """
    check_aggregator(aggregator)
    with aggregator.step_of_ranks():
        check_count("steps", steps, least=1)
        _check_optimizer(model, optimizer, first_order)
        parameters = dict(model.named_parameters())
        n = check_tasks(parameters, tasks, "support", "query", least=aggregator.fewest)
        loss_fn = ScalarLoss(loss_fn)
        batch = TaskBatch(model, aggregator, memory=memory)
        for i in range(n):
            task = tree_map(lambda leaf, i=i: leaf[i], tasks)
            with higher.innerloop_ctx(
                model, optimizer, copy_initial_weights=False, track_higher_grads=not first_order
            ) as (learner, inner):
                for _ in range(steps):
                    loss = loss_fn(learner, task["support"])
                    check_depends(loss, learner.parameters(), i, advice="compute it by the learner")
                    inner.step(loss)
                loss = loss_fn(learner, task["query"])
            batch.add(loss, adapted=learner)
        engine = "one_backward" if batch.takes_one_backward else "stacked"
        return MetaStep._make([*batch.backward(), engine])


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, first_order: bool) -> None:
    """Raises where higher would only print a tensor, or silently adapt a frozen parameter."""
    if not (isinstance(model, nn.Module) and isinstance(optimizer, torch.optim.Optimizer)):
        raise TypeError(
            f"expected a module and an optimizer of torch.optim, found {type(model).__name__} and "
            f"{type(optimizer).__name__}; call meta_step(model, optimizer, …)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held <= {id(parameter) for parameter in model.parameters()}:
        raise ValueError(
            "expected an inner optimizer over parameters of the model, found one that holds "
            "others; build it as torch.optim.SGD(model.parameters(), lr=…)"
        )
    for name, parameter in model.named_parameters():
        # In second order higher leaves it alone.
        if first_order and id(parameter) in held and not parameter.requires_grad:
            raise ValueError(
                f"expected an inner optimizer over trained parameters, found {name!r} frozen, "
                "which higher adapts where track_higher_grads=False; give the optimizer only "
                "parameters that require a gradient"
            )
