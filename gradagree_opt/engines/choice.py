"""Which engine runs: the one that was asked for, or the first suitable one that can."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.diagnostics import Diagnostics
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.shards import of_no_task
from gradagree_opt.core.stacks import PyTree, task_count
from gradagree_opt.engines.candidates import ENGINES, EngineName, candidates
from gradagree_opt.engines.compilation import maybe_compiled
from gradagree_opt.engines.cures import (
    Cure,
    explaining,
    few,
    of_a_loop,
    of_the_kernel,
    of_the_map,
    of_the_order,
    one_of,
    uncompiled,
)
from gradagree_opt.engines.kept import left_as_found
from gradagree_opt.engines.losses import TaskLoss, TaskMap, some_loss_depends
from gradagree_opt.engines.random_state import draws_of_each_task
from gradagree_opt.one_process import check_one_process
from gradagree_opt.options import check_choice

STREAMED = "engine='streamed'"


class AggregatedGradients(NamedTuple):
    """Gradients of n tasks as one update: an :class:`~gradagree_opt.Aggregation` and its losses.

    Attributes:
        update: a descent gradient, a pytree like the (meta-)parameters: what an optimizer
            subtracts. Nothing is changed until it does.
        weights: ``[n]``, or ``[groups, n]`` where the scope is not "global".
        scores: what the weights come from.
        diagnostics: plain tensors that say how the tasks agreed.
        losses: ``[n]``, of every task (in meta-learning, after adaptation).
        engine: name of the engine that ran.
    """

    update: PyTree
    weights: Float[Tensor, "*groups n"]
    scores: Float[Tensor, "*groups n"]
    diagnostics: Diagnostics
    losses: Float[Tensor, " n"]
    engine: str


class Runner:
    """Runs batches of one task loss by the engine asked for, compiled once where asked for.

    Args:
        task_loss: loss and signal of one task.
        engine: "auto" takes the first engine that suits the aggregator and the size of the stack
            of gradients, and the next one where the model cannot be run by it.
        compile: torch.compile every engine but "streamed", which is a loop and not taken then.
        signal_like: from the parameters to what a task's signal is shaped like; to an empty tuple
            where that is the gradient.

    Raises:
        ValueError: the engine is none of its choices, or cannot be compiled.
    """

    def __init__(
        self,
        task_loss: TaskLoss,
        engine: EngineName,
        compile: bool,
        *,
        signal_like: Callable[[PyTree], PyTree] = lambda _: (),
    ) -> None:
        check_choice("engine", engine, ("auto", *ENGINES))
        if compile and engine == "streamed":
            raise ValueError(
                "expected an engine that torch.compile takes whole, found 'streamed', a loop over "
                "the tasks; give compile=False or engine='stacked'"
            )
        self.task_loss = task_loss
        self.engine = engine
        self._compile = compile
        self._signal_like = signal_like
        self._failed: set[str] = set()
        self._tried: set[str] = set()
        self._engines = {
            name: maybe_compiled(partial(_constants, each.run), compile and name != "streamed")
            for name, each in ENGINES.items()
        }

    def __call__(
        self, params: PyTree, tasks: PyTree, n: int, aggregator: Aggregator, /
    ) -> AggregatedGradients:
        """The aggregation of one batch of n tasks, looked at by :meth:`Aggregator.verify`.

        Raises:
            ValueError: the aggregator refuses the tasks, or the engine the aggregator; or several
                ranks train.
            RuntimeError: the engine cannot run the model, or memory does not suffice.
        """
        check_ranks(params, aggregator, self._compile)
        aggregator = aggregator.for_batch(n)
        *others, last = self._candidates(self.task_loss, params, n, aggregator)
        if n == 0:
            return self._of_no_task(params, aggregator)
        for name in others:
            try:
                return self._run(name, params, tasks, aggregator)
            except RuntimeError:
                if aggregator.ranks is not None and aggregator.ranks.joined:
                    raise  # no second try once the ranks have met
                if self._compile:  # to try again would be to compile again
                    self._failed.add(name)
        refusal = ENGINES["streamed"].refusal(aggregator, self.task_loss)
        streams = refusal is None and last != "streamed"
        without = STREAMED if streams else self._loop
        with explaining(
            f"engine={last!r}",
            1 if last == "streamed" else self.task_loss.map.at_once(n),
            self.task_loss.map.source,
            lambda: self._cures(params, few(tasks), aggregator, streams),
            without="compile=False" if self._compile else without,
        ):
            return self._run(last, params, tasks, aggregator)

    def _cures(
        self, params: PyTree, tasks: PyTree, aggregator: Aggregator, streams: bool
    ) -> Iterator[Cure]:
        """What may run the model where the last engine does not, the best first."""
        n = task_count(tasks, "tasks")
        aggregator = aggregator.of_one_process().for_batch(n)

        def run(task_loss: TaskLoss, *engines: str) -> None:
            *others, final = engines or self._candidates(task_loss, params, n, aggregator)
            for name in others:
                with suppress(RuntimeError):
                    self._try(name, task_loss, params, tasks, aggregator)
                    return
            self._try(final, task_loss, params, tasks, aggregator)

        here = self.task_loss
        if self._compile:
            engines = self._candidates(here, params, n, aggregator)
            if streams and self.engine == "auto":  # which is left out where all is compiled
                engines.append("streamed")
            yield Cure("compile=False", partial(run, here, *engines))
        others = chain(
            of_the_map(here.map, lambda task_map: run(replace(here, map=task_map))),
            [Cure(STREAMED, partial(run, here, "streamed"))] * streams,
            [of_the_kernel(partial(run, here))],
            of_the_order(here, run),
        )
        yield from uncompiled(others) if self._compile else others
        if here.plain_loss is not None:
            yield of_a_loop(here.plain_loss, params, one_of(tasks), self._loop)

    @property
    def _loop(self) -> str:
        form = "loss, adapted=…" if self.task_loss.adapts else "loss, …"
        return f"a loop of TaskBatch.add({form})"

    def _try(
        self,
        name: str,
        task_loss: TaskLoss,
        params: PyTree,
        tasks: PyTree,
        aggregator: Aggregator,
    ) -> None:
        """Runs an engine uncompiled, for a trial of another task loss or engine."""
        knows = name == "streamed" and not task_loss.adapts
        with nullcontext() if knows else left_as_found(task_loss.map.source):
            _constants(ENGINES[name].run, task_loss, params, tasks, aggregator)

    def unchecked(self, params: PyTree, tasks: PyTree, aggregator: Aggregator, /) -> Aggregation:
        """The aggregation by the most suitable engine, unchecked, and without trying another."""
        name = self._candidates(self.task_loss, params, task_count(tasks, "tasks"), aggregator)[0]
        aggregation, _ = self._engines[name](self.task_loss, params, tasks, aggregator)
        return aggregation

    def _of_no_task(self, params: PyTree, aggregator: Aggregator) -> AggregatedGradients:
        """The part of a rank that has no task."""
        nothing = of_no_task(params)
        signal = of_no_task(self._signal_like(params))
        aggregation = aggregator.aggregate_unchecked(
            nothing, signal if tree_leaves(signal) else None
        )
        aggregator.verify(aggregation)
        losses = tree_leaves(nothing)[0].new_zeros(0)
        return AggregatedGradients(*aggregation, losses=losses, engine="stacked")

    def _run(
        self,
        name: str,
        params: PyTree,
        tasks: PyTree,
        aggregator: Aggregator,
    ) -> AggregatedGradients:
        task_loss = self.task_loss if self._compile else self.task_loss.walked()
        with some_loss_depends(), self._left_as_found(name, task_loss.map, params, tasks):
            aggregation, losses = self._engines[name](task_loss, params, tasks, aggregator)
        aggregator.verify(aggregation)
        return AggregatedGradients(*aggregation, losses=losses, engine=name)

    def _left_as_found(
        self, name: str, task_map: TaskMap, params: PyTree, tasks: PyTree
    ) -> AbstractContextManager[None]:
        """Goes around a run: what the loss function reaches is as before, or it says why not."""
        if name == "streamed" and not self.task_loss.adapts:
            return nullcontext()  # which knows its passes
        if not self._compile:
            return left_as_found(task_map.source)
        # A graph shows neither buffers nor generators that change, nor a loss of no parameter.
        if name not in self._tried:
            first = tree_map(lambda leaf: leaf[:1], tasks)
            with (
                some_loss_depends(),
                left_as_found(task_map.source),
                draws_of_each_task("error", task_map.source),
            ):
                gradient = torch.func.grad(self.task_loss.function, has_aux=True)
                task_map(gradient, params, first, 1)
            self._tried.add(name)
        return nullcontext()

    def _candidates(
        self, task_loss: TaskLoss, params: PyTree, n: int, aggregator: Aggregator
    ) -> list[str]:
        """The engines to try, the best first; those that have failed come last."""
        order = candidates(
            self.engine, task_loss, tree_leaves(params), n, aggregator, loops=not self._compile
        )
        return sorted(order, key=self._failed.__contains__)


def check_ranks(params: PyTree, aggregator: Aggregator, compile: bool, /) -> None:
    """Raises a ValueError where several ranks train without ``ga.distributed``, or compiled."""
    over_ranks = aggregator.ranks is not None
    check_one_process(tree_leaves(params), over_ranks=over_ranks)
    if over_ranks and compile:
        raise ValueError(
            "expected an aggregator of one process with compile=True, found one of several "
            "ranks, whose messages no graph holds; give compile=False"
        )


def _constants(
    run: Callable[..., tuple[Aggregation, Tensor]],
    task_loss: TaskLoss,
    params: PyTree,
    *others: Any,
) -> tuple[Aggregation, Tensor]:
    """An engine's answer as constants, even if the parameters require a gradient."""
    answer = run(task_loss, tree_map(torch.Tensor.detach, params), *others)
    result: tuple[Aggregation, Tensor] = tree_map(torch.Tensor.detach, answer)
    return result
