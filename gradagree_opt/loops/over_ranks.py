"""What a loop over tasks tells the other ranks: what its tasks use, and a task that has failed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.diagnostics import Diagnostics
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.shards import are_sharded
from gradagree_opt.core.stacks import PyTree, nonfinite_tasks
from gradagree_opt.loops.accumulation import add_to_grad, check_no_accumulation_hooks
from gradagree_opt.loops.graphs import stale_graphs
from gradagree_opt.one_process import (
    check_fills_grad,
    check_not_unsharded,
    check_one_process,
    inside,
    reshard,
)


def unwrapped(parameters: Any, aggregator: Aggregator, /) -> Any:
    """What a TaskBatch was given, without the wrapper of DistributedDataParallel.

    Raises:
        ValueError: several ranks train, or a wrapper sends more than gradients.
    """
    over_ranks = aggregator.ranks is not None
    check_one_process((), parameters, over_ranks=over_ranks, wrapped=True)
    reshard(parameters)
    return inside(parameters)


def check_ranks(
    parameters: Mapping[str, Tensor], aggregator: Aggregator, /, *, adapts: bool = False
) -> None:
    """Raises a ValueError where several ranks train what the aggregator or the form cannot."""
    over_ranks = aggregator.ranks is not None
    check_one_process(parameters.values(), over_ranks=over_ranks, wrapped=True)
    check_not_unsharded(parameters)
    if adapts and are_sharded(parameters):
        raise ValueError(
            "expected losses alone of sharded parameters, found adapted ones, through whose "
            "inner steps FSDP gives no gradient; call add(loss), or leave out fully_shard"
        )


def accumulated_gradient(
    loss: Tensor, parameters: Mapping[str, Tensor], used: set[str], /, *, retain_graph: bool
) -> dict[str, Tensor]:
    """∇L by name of sharded parameters, which no function returns: a backward pass fills ``.grad``.

    That of a parameter is as before afterwards. The names of those that the loss depends on are
    added to ``used``.

    Raises:
        ValueError: the graph of the loss is stale, a hook hangs on the accumulation, FSDP is told
            to gather gradients, or no ``.grad`` is filled.
    """
    check_fills_grad(parameters)
    before = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        check_no_accumulation_hooks(parameter, advice="step the optimizer after the batch")
    gradient = {}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        with stale_graphs():
            torch.autograd.backward(loss, retain_graph=retain_graph)
        for name, parameter in parameters.items():
            grad = parameter.grad
            gradient[name] = torch.zeros_like(parameter) if grad is None else grad
        if all(parameter.grad is None for parameter in parameters.values()):
            raise ValueError(
                "expected a backward pass that fills .grad of the parameters, found one that fills "
                "none; compute the loss by the sharded module"
            )
        used.update(n for n, parameter in parameters.items() if parameter.grad is not None)
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]
    return gradient


@contextmanager
def task_of(batch: object, aggregator: Aggregator, /) -> Iterator[None]:
    """A context around one task before any step: if it fails, the next step must be its batch's."""
    try:
        yield
    except Exception:
        if aggregator.ranks is not None:
            aggregator.ranks.left = batch
        raise


class Used:
    """Which parameters a task of any rank uses; the messages of the aggregation tell it.

    A task that the aggregator drops uses none. Where parameters are sharded it counts all the same,
    because no rank knows which numbers its tasks have.

    Args:
        aggregator: of one process or of several ranks, whose step has begun.
        parameters: all that are trained, in the same order on every rank.
        used: names of those that each of this rank's tasks uses, to be filled while these are
            aggregated.
    """

    def __init__(
        self, aggregator: Aggregator, parameters: Mapping[str, Tensor], used: Sequence[set[str]]
    ) -> None:
        self._drops = aggregator.nonfinite == "drop" and not are_sharded(parameters)
        self._ranks = aggregator.ranks
        self._parameters = parameters
        self._used = used
        if self._ranks is not None:
            self._ranks.flags = self._flags

    def look_at(
        self, directions: PyTree, signal: PyTree = None, nonfinite: Tensor | None = None
    ) -> None:
        """What several ranks have to know before they aggregate: which tasks are dropped.

        Args:
            directions, signal: task-stacked pytrees.
            nonfinite: tasks known to be so.
        """
        if self._ranks is not None and self._drops:
            found = nonfinite_tasks(directions, signal)
            self._leave_out(found if nonfinite is None else nonfinite | found)

    def add_to_grad(self, result: Aggregation) -> None:
        """Adds the update to ``.grad`` of the parameters that a task uses."""
        used = self.by_any(result.diagnostics)
        add_to_grad(used, result.update, over_ranks=self._ranks is not None)

    def by_any(self, diagnostics: Diagnostics) -> dict[str, Tensor]:
        """The parameters that a task of any rank uses, by name; known after the aggregation."""
        if self._ranks is None and self._drops:
            self._leave_out(diagnostics.nonfinite)
        flags = self._flags() if self._ranks is None else self._ranks.flagged
        pairs = zip(self._parameters.items(), flags, strict=True)
        return {name: parameter for (name, parameter), flag in pairs if flag}

    def _flags(self) -> list[bool]:
        used = set().union(*self._used)
        return [name in used for name in self._parameters]

    def _leave_out(self, dropped: Tensor) -> None:
        for names, out in zip(self._used, dropped.tolist(), strict=True):
            if out:
                names.clear()
