"""Multi-task learning on the graph that is there: no gradient of a task where none is read."""

from functools import partial

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.few_passes import (
    apply_row_sums,
    measured_by,
    reads_signal,
    row_sums_refusal,
    weighted_loss_refusal,
)
from gradagree_opt.core.results import Aggregation
from gradagree_opt.engines.candidates import are_large
from gradagree_opt.engines.one_at_a_time import measured_in_two_passes, weighted_sum
from gradagree_opt.loops.loss_graph import LossGraph

FEW = 2
"""Up to so many gradients take no more backward passes than their row sums do."""
TOLERANCE = 0.01
"""How far Σ_i g_i · S may be from S · S, relative to that, in row sums that are believed."""


def aggregate_losses(
    graph: LossGraph, nonfinite: Bool[Tensor, " n"], aggregator: Aggregator, /
) -> Aggregation | None:
    """The aggregation of the gradients of n losses, by few passes over their graph.

    Weights that read no gradient take one backward pass, those that read row sums alone three. The
    others take two for each task, and one more, if holding all gradients would be slower.

    Args:
        graph: of the losses; alive afterwards where the answer is None.
        nonfinite: the tasks whose loss is not finite.
        aggregator: what weights the tasks.

    Returns:
        None where the gradients of all tasks are to be held: they are few or small, the aggregator
        reads more of them, or one is not finite and is to be named or dropped.

    Raises:
        ValueError: the graph of a loss is stale.
    """
    if aggregator.ranks is not None:
        return None
    large = are_large([*graph.params.values()], graph.n)
    if aggregator.scope == "global" and not graph.is_coarse:
        if not reads_signal(aggregator) and weighted_loss_refusal(aggregator) is None:
            return _unread(graph, nonfinite, aggregator)
        told = row_sums_refusal(aggregator) is None and not graph.is_hooked
        if told and (large or (graph.n > FEW and graph.survey.shared)):
            result = _by_row_sums(graph, nonfinite, aggregator)
            if result is not None:
                return result
    # What reads more than row sums is measured faster on a stack.
    if large and not graph.is_hooked and aggregator.needs <= {"draws"}:
        return _streamed(graph, aggregator)
    return None


def _unread(graph: LossGraph, nonfinite: Tensor, aggregator: Aggregator) -> Aggregation:
    """The mean and its like: one backward pass of the weighted loss, nothing measured."""
    unknown = graph.ones * torch.nan
    waits = aggregator.nonfinite != "propagate"
    measured = measured_by(unknown, unknown.new_ones(()), nonfinite, aggregator, waits=waits)
    return aggregator.apply(measured, graph.combined_for(aggregator))


def _by_row_sums(graph: LossGraph, nonfinite: Tensor, aggregator: Aggregator) -> Aggregation | None:
    """Σ g_j, every g_i · Σ_j g_j, and the weighted loss; None if they fail or are not believed."""
    waits = aggregator.nonfinite != "propagate"
    try:
        row_sums, scale, norm = graph.row_sums(waits=waits)
    except RuntimeError:  # a graph without second derivatives
        return None
    if waits:
        square = (norm / scale).square()
        sound = (row_sums.sum() - square).abs() <= TOLERANCE * square
        if not bool(sound & ~nonfinite.any()):
            return None
    measured = measured_by(row_sums, scale, nonfinite, aggregator, waits=waits)
    combined = graph.combined_for(aggregator)
    return apply_row_sums(aggregator, measured, combined, norm, graph.eps)


def _streamed(graph: LossGraph, aggregator: Aggregator) -> Aggregation:
    """Two passes, one gradient at a time; then one of the weighted loss, or a third like them."""
    measured, _ = measured_in_two_passes(graph, aggregator)
    apart = weighted_loss_refusal(aggregator) is not None or aggregator.scope != "global"
    combined = graph.combined_for(aggregator)
    if apart or graph.is_coarse:
        combined = partial(weighted_sum, graph)
    return aggregator.apply(measured, combined)
