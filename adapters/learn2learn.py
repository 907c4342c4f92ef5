"""learn2learn: its algorithms over all tasks at once, its tasksets as a task distribution.

A loop over ``clone()`` and ``adapt()`` needs nothing from here: :class:`gradagree_opt.TaskBatch`
takes the learners.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradagree_opt.batchnorm import RunningStatistics, statistics_refused
from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.diagnostics import check_some_task
from gradagree_opt.core.few_passes import measures_directions
from gradagree_opt.core.header import TaskForm
from gradagree_opt.core.shards import of_no_task
from gradagree_opt.core.stacks import PyTree, task_count
from gradagree_opt.engines.cures import Cure, explaining, few, of_the_kernel
from gradagree_opt.engines.kept import NoDataSet, left_as_found
from gradagree_opt.engines.losses import ScalarLoss
from gradagree_opt.engines.random_state import draws_of_each_task
from gradagree_opt.engines.reached import reach
from gradagree_opt.frameworks import require
from gradagree_opt.functional import call_with
from gradagree_opt.loops.adapted import displacement, match, trained
from gradagree_opt.loops.graphs import check_depends, dependencies
from gradagree_opt.loops.over_ranks import Used
from gradagree_opt.meta.steps import LearnerLoss, MetaStep, check_tasks
from gradagree_opt.one_process import check_one_process
from gradagree_opt.options import check_count

require("learn2learn")

from learn2learn.algorithms import GBML, MAML, MetaSGD  # noqa: E402 - require says how to install it

from gradagree_opt.tasks.tasksets import Tasksets  # noqa: E402 - needs NumPy, as learn2learn does

__all__ = ["Tasksets", "meta_step"]


def meta_step(
    algorithm: nn.Module,
    loss_fn: LearnerLoss,
    tasks: PyTree,
    aggregator: Aggregator,
    /,
    *,
    steps: int = 1,
    chunk_size: int | None = None,
) -> MetaStep:
    """``clone()`` and ``adapt()`` of all tasks at once, their aggregation added to ``.grad``.

    The algorithm's own code runs under vmap, so its options (``first_order``, ``allow_unused``,
    transforms, …) mean what they mean in a loop, and every learner is in the training mode and
    draws the dropout masks that it would there. BatchNorm's running statistics, which learn2learn's
    learners share, end as if one task had come after the other.

    Args:
        algorithm: MAML, MetaSGD, GBML, or any module with ``clone()`` and ``adapt(loss)``.
        loss_fn: ``loss_fn(learner, batch) -> scalar`` of one task, without branches that depend on
            the values of tensors.
        tasks: ``{"support": batch, "query": batch}`` with leaves ``[n, *shape]``.
        aggregator: what weights the tasks, by their displacements or, as Equal Agreement, by their
            meta-gradients: see the signal of :class:`gradagree_opt.MAML`.
        steps: calls of ``adapt``, each on the whole support set.
        chunk_size: tasks at a time, which bounds the memory; None for all.

    Returns:
        The update by name of the parameter, the losses after adaptation and the weights.

    Raises:
        TypeError: the algorithm or the aggregator is not one.
        ValueError: the tasks are not task-stacked; a parameter is frozen or unused and the
            algorithm does not allow it; a module is recurrent; the loss has parameters that are not
            the learner's, or none; several ranks train; or the aggregator refuses the tasks.
            Nothing is changed then.
        RuntimeError: vmap cannot run the model, or memory does not suffice.

    Source: Eshratifar et al. 2018, algorithm 1, the MAML form.

    >>> import gradagree_opt as ga
    >>> maml = MAML(nn.Linear(1, 1), lr=0.1)
    >>> x = torch.rand(4, 10, 1)
    >>> tasks = {"support": (x[:, ::2], x[:, ::2]), "query": (x[:, 1::2], x[:, 1::2])}
    >>> def loss_fn(learner, batch):
    ...     return ((learner(batch[0]) - batch[1]) ** 2).mean()
    >>> result = meta_step(maml, loss_fn, tasks, ga.GradientAgreement())
    >>> maml.module.weight.grad.shape, result.losses.shape
    (torch.Size([1, 1]), torch.Size([4]))
    """
    check_aggregator(aggregator)
    with aggregator.step_of_ranks(form=TaskForm.LOSSES | TaskForm.DISPLACEMENTS):
        return _meta_step(algorithm, loss_fn, tasks, aggregator, steps, chunk_size)


def _meta_step(
    algorithm: nn.Module,
    loss_fn: LearnerLoss,
    tasks: PyTree,
    aggregator: Aggregator,
    steps: int,
    chunk_size: int | None,
) -> MetaStep:
    _check_algorithm(algorithm, steps)
    parameters = trained(dict(algorithm.named_parameters()))
    over_ranks = aggregator.ranks is not None
    check_one_process(parameters.values(), algorithm, over_ranks=over_ranks)
    n = check_tasks(parameters, tasks, "support", "query", least=aggregator.fewest)
    statistics = RunningStatistics(algorithm)
    own = measures_directions(aggregator)
    run = _Task(algorithm, ScalarLoss(loss_fn), steps, moves=not own)
    gradient = _vmapped(run, chunk_size)
    params = tree_map(torch.Tensor.detach, parameters)
    reached = reach((loss_fn, algorithm))

    def run_all(tasks: PyTree) -> Any:
        copies = statistics.for_tasks(task_count(tasks, "tasks"))
        with left_as_found(reached), NoDataSet(), draws_of_each_task("different", reached):
            return gradient(params, copies, tasks)

    def cures() -> Iterator[Cure]:
        yield of_the_kernel(lambda: run_all(few(tasks)))
        yield Cure(without, lambda: _loop(run, tasks))

    by, without = "learn2learn.meta_step", "a loop over clone() and adapt() with TaskBatch"
    if n:
        chunk = min(n, chunk_size or n)
        with statistics_refused(), explaining(by, chunk, reached, cures, without=without):
            directions, (signal, losses, buffers) = run_all(tasks)
    else:  # on one of several ranks
        directions = signal = of_no_task(params)
        losses = next(iter(directions.values())).new_zeros(0)
    if losses.requires_grad:
        raise ValueError(
            "expected a loss whose trained parameters are all the algorithm's, found one with "
            "others, which would get no gradient; make them part of a module with clone() and "
            "adapt(), or freeze them with requires_grad_(False)"
        )
    used = Used(aggregator, parameters, [{*run.used} for _ in range(n)])
    used.look_at(directions, None if own else signal)
    aggregation = aggregator.aggregate(directions, None if own else signal)
    check_some_task(aggregation.diagnostics, aggregator.nonfinite)
    if n:
        statistics.follow(buffers)
    used.add_to_grad(aggregation)
    return MetaStep(*aggregation, losses=losses, engine="stacked")


class _Task(nn.Module):
    """Adaptation to one task, as a module so that its parameters can be swapped."""

    def __init__(self, algorithm: Any, loss_fn: LearnerLoss, steps: int, *, moves: bool) -> None:
        super().__init__()
        self.algorithm = algorithm
        self.loss_fn = loss_fn
        self.steps = steps
        self.moves = moves
        self.used: set[str] = set()

    def forward(self, task: PyTree) -> tuple[Tensor, dict[str, Tensor]]:
        """Query loss after adaptation, and the displacement where it is asked for.

        Notes which parameters the loss depends on.
        """
        before = dict(self.algorithm.named_parameters())
        learner = self.algorithm.clone()
        for _ in range(self.steps):
            loss = self.loss_fn(learner, task["support"])
            _check_adaptable(learner, loss)
            # Frozen parameters were checked; with allow_nograd, adapt raises where it else prints.
            prints = getattr(type(learner), "adapt", None) in (MAML.adapt, GBML.adapt)
            learner.adapt(loss, **({"allow_nograd": True} if prints else {}))
        start = {name: p for name, p in before.items() if p.requires_grad}
        loss = self.loss_fn(learner, task["query"])
        check_depends(loss, learner.parameters(), None, advice="compute it by the learner")
        names, tensors = zip(*start.items(), strict=True)
        self.used.update(names[at] for at in dependencies(loss, tensors))
        after = match(before, learner)
        return loss, displacement(start, after) if self.moves else {}


def _vmapped(run: _Task, chunk_size: int | None) -> Callable[[PyTree, PyTree, PyTree], Any]:
    """From parameters, buffers of each task and tasks to gradients, displacements and losses.

    The buffers come last, as the tasks have left them.
    """

    def one_task(params: PyTree, buffers: PyTree, task: PyTree) -> tuple[Tensor, PyTree]:
        swapped = {f"algorithm.{name}": t for name, t in (params | buffers).items()}
        loss, moved = call_with(run, swapped, task)
        return loss, (moved, loss, buffers)

    return torch.func.vmap(
        torch.func.grad(one_task, has_aux=True),
        (None, 0, 0),
        randomness="different",
        chunk_size=chunk_size,
    )


def _loop(run: _Task, tasks: PyTree) -> None:
    """One task as a loop runs it."""
    loss, _ = run(tree_map(lambda leaf: leaf[0], tasks))
    parameters = [each for each in run.parameters() if each.requires_grad]
    torch.autograd.grad(loss, parameters, allow_unused=True)


def _check_algorithm(algorithm: object, steps: int) -> None:
    if not isinstance(algorithm, nn.Module) or not all(
        callable(getattr(algorithm, method, None)) for method in ("clone", "adapt")
    ):
        raise TypeError(
            f"expected an algorithm with clone() and adapt(), found {type(algorithm).__name__}; "
            "wrap the model, as in learn2learn.algorithms.MAML(model, lr=…)"
        )
    check_count("steps", steps, least=1)
    if isinstance(algorithm, GBML) and algorithm.adapt_transform and algorithm.first_order:
        raise ValueError(
            "expected GBML with adapt_transform=True to be of second order, found "
            "first_order=True, with which it frees the graph that it adapts the transform by; "
            "leave out one of the two"
        )
    for name, module in algorithm.named_modules():
        if isinstance(module, nn.RNNBase):
            raise ValueError(
                f"expected modules whose clones run under vmap, found {type(module).__name__} in "
                f"{name!r}; loop over clone() and adapt() with TaskBatch"
            )


def _check_adaptable(learner: Any, loss: Tensor) -> None:
    """Raises a ValueError where learn2learn prints a traceback and goes on without gradients."""
    if not isinstance(learner, MAML | MetaSGD | GBML):
        return
    names, parameters = zip(*learner.module.named_parameters(), strict=True)
    # MetaSGD has neither option.
    for option, there, state in (
        ("allow_nograd", {at for at, p in enumerate(parameters) if p.requires_grad}, "frozen"),
        ("allow_unused", set(dependencies(loss, parameters)), "not used by the loss"),
    ):
        refused = [name for at, name in enumerate(names) if at not in there]
        if refused and not getattr(learner, option, False):
            raise ValueError(
                f"expected parameters that the loss can adapt, found {refused[0]!r} {state}; give "
                f"{option}=True to MAML or GBML, or keep it outside the adapted module"
            )
