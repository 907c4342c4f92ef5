"""Aggregations that form no gradient of a single task, and so hold no stack of n gradients.

Once the weights are known, one backward pass of the weighted loss gives the update. Weightings that
read row sums alone decide from s = J (Jᵀ 1), two more passes. The functions here tell which
aggregators allow either, and aggregate from row sums.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.agreement import AgreementWeighting
from gradagree_opt.core.results import Aggregation, Combine, Measured
from gradagree_opt.core.stacks import tree_norm
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.weightings import Decision, UniformWeighting, draws_itself


def weighted_loss_refusal(aggregator: Aggregator, /) -> str | None:
    """Why no backward pass of the weighted loss gives the update, in half a sentence; or None."""
    if "directions" in aggregator.needs:
        return "its update is no weighted sum, and needs the gradient of each task"
    if aggregator.nonfinite == "drop":  # 0 · NaN is NaN
        return "nonfinite='drop' must keep a task out of the backward pass that all share"
    return None


def row_sums_refusal(aggregator: Aggregator, /) -> str | None:
    """Why the row sums do not tell the weights, in half a sentence; None where they do."""
    if aggregator.ranks is not None:
        return "the row sums of a rank's own tasks say nothing of those of the others"
    missing = sorted(aggregator.needs - {"draws"})
    if missing:
        return f"its weighting reads {', '.join(missing)}, which no row sum tells"
    if aggregator.scope != "global":
        return f"scope={aggregator.scope!r} needs the row sums of each group"
    if isinstance(aggregator.reference, AgreementWeighting):
        return "Gradient Agreement as match_norm needs the norms of the gradients where they cancel"
    if draws_itself(aggregator.weightings):  # see apply_row_sums
        return "its weighting draws by itself or remembers, and would be asked twice for a batch"
    return None


def reads_signal(aggregator: Aggregator, /) -> bool:
    """Whether the weights, or the length that the update gets, depend on the signals."""
    # match_norm does not rescale an update that is rounding alone, and recognises it by the norms.
    # The mean and the sum need none: where one of them is rounding, so is the other.
    equal = all(isinstance(each, UniformWeighting) for each in aggregator.weightings)
    reads = getattr(aggregator.weighting, "reads_signal", True)
    return not equal and (reads or aggregator.reference is not None)


def measures_directions(aggregator: Aggregator, /) -> bool:
    """Whether the weights are made for the vectors that they combine, and not for other signals."""
    weighting = aggregator.weighting
    if not getattr(weighting, "reads_signal", True):
        weighting = aggregator.reference or weighting
    return getattr(weighting, "measures_directions", False)


def measured_by(
    row_sums: Float[Tensor, " n"],
    scale: Float[Tensor, ""],
    nonfinite: Bool[Tensor, " n"],
    aggregator: Aggregator,
    /,
    *,
    waits: bool = False,
) -> Measured:
    """What is measured of signals whose norms are unknown.

    Args:
        row_sums: in units of scale²; NaN where no weighting reads them.
        scale: power of two or not, positive.
        nonfinite: the tasks whose loss is not finite.
        aggregator: that weights them.
        waits: whether the host may wait for the device to save what is not needed.
    """
    statistics = Statistics(
        row_sums=row_sums,
        squared_norms=None,
        cosine_row_sums=None,
        finite=~nonfinite,
        active=torch.ones_like(nonfinite),
        scale=scale,
    )
    return Measured(aggregator.with_draws(statistics), nonfinite, None, waits=waits)


def apply_row_sums(
    aggregator: Aggregator,
    measured: Measured,
    combine_directions: Combine,
    norm: Float[Tensor, ""],
    eps: float,
    /,
) -> Aggregation:
    """:meth:`Aggregator.apply` from row sums alone, without norms that show whether they cancel.

    If Σ g_j is nothing but rounding error, its row sums would give an update as long as the
    gradients. The update is zero then, and weights and scores are those of row sums of zero.

    Args:
        aggregator: one that :func:`row_sums_refusal` finds nothing against.
        measured: result of :func:`measured_by`.
        combine_directions: linear map from weights to Σ_i w_i g_i.
        norm: ‖Σ g_j‖.
        eps: to which the gradients are rounded.
    """
    decided = aggregator.decide(measured)
    update, length, decided = aggregator.combine(measured, decided, combine_directions)
    if length is None:
        length = tree_norm(update)
    statistics, decision = measured.statistics, decided.decision
    size = decision.weights.abs().sum()  # 1, unless the update has another one's length
    rounding = 8 * eps * statistics.row_sums.shape[-1] ** 1.5
    cancelled = norm * size <= rounding * length
    if measured.waits and not cancelled:
        return aggregator.answer(measured, decided, update, length)
    nothing = statistics._replace(row_sums=torch.zeros_like(statistics.row_sums))
    without = aggregator.decide(measured._replace(statistics=nothing))
    degenerate = cancelled & without.decision.degenerate

    def unless_degenerate(value: Tensor) -> Tensor:
        return torch.where(degenerate, value.new_zeros(()), value)

    leaves, structure = tree_flatten(update)
    del update
    for index, leaf in enumerate(leaves):  # one by one, so that each reuses the memory of the last
        leaves[index] = unless_degenerate(leaf)
    row_sums = unless_degenerate(statistics.row_sums)
    pairs = zip(without.decision, decision, strict=True)
    decision = Decision(*[torch.where(degenerate, a, b) for a, b in pairs])
    return aggregator.answer(
        measured._replace(statistics=statistics._replace(row_sums=row_sums)),
        decided._replace(decision=decision),
        tree_unflatten(leaves, structure),
        unless_degenerate(length),
    )
