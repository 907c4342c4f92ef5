"""Reptile: the displacement is both the signal and the direction (Nichol et al. 2018)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gradagree_opt.batchnorm import statistics_refused
from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.header import TaskForm
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.shards import of_no_task
from gradagree_opt.core.stacks import PyTree, task_count
from gradagree_opt.engines.choice import check_ranks
from gradagree_opt.engines.compilation import maybe_compiled
from gradagree_opt.engines.cures import (
    Cure,
    explaining,
    few,
    of_a_loop,
    of_the_map,
    one_of,
    uncompiled,
)
from gradagree_opt.engines.kept import left_as_found
from gradagree_opt.engines.losses import (
    LossFn,
    Randomness,
    ScalarLoss,
    TaskMap,
    some_loss_depends,
)
from gradagree_opt.engines.meant import naming_what_was_meant
from gradagree_opt.meta.adapting import adapt_to
from gradagree_opt.meta.inner import InnerLoop, check_inner, watched
from gradagree_opt.meta.steps import MetaStep, check_tasks


class Reptile:
    """θ ← θ + α_out Σ_i w_i (θ_i − θ), as the descent gradient Σ_i w_i (θ − θ_i).

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` of one task.
        inner: the inner loop, as :class:`gradagree_opt.InnerSGD`.
        chunk_size: tasks per vmap, which bounds the memory of the inner loops; None for all at
            once, 1 for no vmap.
        randomness: of dropout and the like under vmap, as in ``torch.func.vmap``.
        compile: torch.compile the inner loops of all tasks as one graph (a minute the first time).

    Source: Eshratifar et al. 2018, algorithm 1, the Reptile form; Nichol et al. 2018.

    >>> import gradagree_opt as ga
    >>> reptile = ga.Reptile(lambda w, x: ((w - x) ** 2).mean(), ga.InnerSGD(lr=0.25, steps=1))
    >>> tasks = {"support": torch.tensor([[1.0], [3.0]])}
    >>> reptile.step(torch.tensor(0.0), tasks, ga.Mean()).update
    tensor(-1.)
    """

    def __init__(
        self,
        loss_fn: LossFn,
        inner: InnerLoop,
        *,
        chunk_size: int | None = None,
        randomness: Randomness = "error",
        compile: bool = False,
    ) -> None:
        self.loss_fn = ScalarLoss(loss_fn)
        check_inner(inner)
        self.inner = inner
        self._map = TaskMap(chunk_size, randomness, (loss_fn, inner))
        self._compile = compile
        self._make_graphs()

    def _make_graphs(self) -> None:
        # Two: a new aggregator need not compile the inner loops again.
        self._displacements = maybe_compiled(self._displacements_by, self._compile)
        self._aggregate = maybe_compiled(_aggregate, self._compile)
        self._tried = not self._compile

    def __getstate__(self) -> dict[str, Any]:
        made = ("_displacements", "_aggregate", "_tried")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_graphs()

    def step(self, params: PyTree, tasks: PyTree, aggregator: Aggregator, /) -> MetaStep:
        """One outer step, without changing the parameters.

        Args:
            params: pytree of floating-point tensors.
            tasks: ``{"support": batch}`` with leaves ``[n, *shape]``; with a "query" set, the
                losses are measured on it instead.
            aggregator: what weights the tasks.

        Raises:
            ValueError, TypeError: the tasks are not task-stacked, the loss is no real scalar or
                depends on no parameter, the model changes its buffers, the aggregator refuses the
                displacements, or several ranks train.
            RuntimeError: vmap cannot run the model, or memory does not suffice.
        """
        check_aggregator(aggregator)
        with aggregator.step_of_ranks(form=TaskForm.DISPLACEMENTS):
            check_ranks(params, aggregator, self._compile)
            n = check_tasks(params, tasks, "support", least=aggregator.fewest)
            if n:
                displacements, losses = self._explained_displacements(params, tasks, n)
            else:  # on one of several ranks
                displacements = of_no_task(params)
                losses = tree_leaves(displacements)[0].new_zeros(0)
            aggregation = self._aggregate(aggregator.for_batch(n), displacements)
            aggregator.verify(aggregation)
        return MetaStep(*aggregation, losses=losses, engine="stacked")

    def _explained_displacements(
        self, params: PyTree, tasks: PyTree, n: int
    ) -> tuple[PyTree, Tensor]:
        """Displacements and losses, or an error that says what helps."""
        without = "a loop of TaskBatch.add(adapted=…)"
        task_map = self._map if self._compile else self._map.walked()

        def run(task_map: TaskMap) -> None:
            some = few(tasks)
            with left_as_found(task_map.source):
                self._displacements_by(task_map, params, some, task_count(some, "tasks"))

        def cures() -> Iterator[Cure]:
            others = of_the_map(task_map, run)
            if self._compile:
                yield Cure("compile=False", partial(run, task_map))
                others = uncompiled(others)
            yield from others
            yield of_a_loop(self.loss_fn, params, one_of(tasks["support"]), without)

        with (
            naming_what_was_meant(self.loss_fn, params, tasks["support"], task_map.source),
            explaining("vmap", task_map.at_once(n), task_map.source, cures, without=without),
            statistics_refused(),
            some_loss_depends(),
            left_as_found(task_map.source),
        ):
            if not self._tried:  # a graph shows no loss that depends on no parameter
                with some_loss_depends():
                    run(task_map)
                self._tried = True
            result: tuple[PyTree, Tensor] = self._displacements(task_map, params, tasks, n)
            return result

    def aggregate_unchecked(
        self, params: PyTree, tasks: PyTree, aggregator: Aggregator, /
    ) -> Aggregation:
        """:meth:`step` without its checks and its losses: runs under vmap and torch.compile.

        Args:
            params, tasks, aggregator: as for :meth:`step`.
        """
        displacements, _ = self._displacements_by(
            self._map, params, tasks, task_count(tasks, "tasks")
        )
        return _aggregate(aggregator, displacements)

    def adapt(self, params: PyTree, support: PyTree, /, *, steps: int | None = None) -> PyTree:
        """Parameters adapted to the support set of one task: see :meth:`MAML.adapt`."""
        adapt = partial(self._adapt, params, steps=steps)
        return adapt_to(support, adapt, params, self.loss_fn, (self.loss_fn, self.inner))

    def _adapt(self, params: PyTree, support: PyTree, steps: int | None = None) -> PyTree:
        with watched(self.inner):
            return self.inner(self.loss_fn, params, support, steps=steps)

    def _displacements_by(
        self, task_map: TaskMap, params: PyTree, tasks: PyTree, n: int
    ) -> tuple[PyTree, Tensor]:
        params = tree_map(lambda p: p.detach(), params)

        def one_task(params: PyTree, task: PyTree) -> tuple[PyTree, Tensor]:
            adapted = self._adapt(params, task["support"])
            loss = self.loss_fn(adapted, task.get("query", task["support"]))
            return tree_map(torch.sub, params, adapted), loss

        result = task_map(one_task, params, tasks, n)
        constants: tuple[PyTree, Tensor] = tree_map(torch.Tensor.detach, result)
        return constants


def _aggregate(aggregator: Aggregator, displacements: PyTree) -> Aggregation:
    return aggregator.aggregate_unchecked(displacements)
