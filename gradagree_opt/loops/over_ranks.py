"""What a loop over tasks tells the other ranks: what its tasks use, and a task that has failed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.loops.accumulation import check_no_accumulation_hooks
from gradagree_opt.loops.graphs import stale_graphs


def accumulated_gradient(
    loss: Tensor, parameters: Mapping[str, Tensor], /, *, retain_graph: bool
) -> dict[str, Tensor]:
    """∇L by name of sharded parameters, which no function returns: a backward pass fills ``.grad``.

    That of a parameter is as before afterwards.

    Raises:
        ValueError: the graph of the loss is stale, or a hook hangs on the accumulation.
    """
    before = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        check_no_accumulation_hooks(parameter, advice="step the optimizer after the batch")
        parameter.grad = None
    try:
        with stale_graphs():
            torch.autograd.backward(loss, retain_graph=retain_graph)
        return {n: p.grad for n, p in parameters.items() if p.grad is not None}
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]


@contextmanager
def task_of(batch: object, aggregator: Aggregator, /) -> Iterator[None]:
    """Around one task, outside of any step: where it fails, no other step may take its place."""
    try:
        yield
    except Exception:
        if aggregator.ranks is not None:
            aggregator.ranks.left = batch
        raise


def used_on_any_rank(
    aggregator: Aggregator, parameters: Mapping[str, Tensor], used: set[str], /
) -> dict[str, Tensor]:
    """Those of the parameters that a task uses, of any rank's.

    Args:
        aggregator: of one process or of several ranks.
        parameters: all that are trained, in the same order on every rank.
        used: names of those that this rank's tasks use.
    """
    flags = [name in used for name in parameters]
    if aggregator.ranks is not None:
        device = next(iter(parameters.values())).device
        flags = aggregator.ranks.used_by_any(flags, device)
    return {name: p for (name, p), flag in zip(parameters.items(), flags, strict=True) if flag}
