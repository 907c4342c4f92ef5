"""What an aggregation tells about itself: plain tensors, read on the host only by ``log``."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.blocks import or_one, power_of_two
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.transforms import is_wrapped
from gradagree_opt.core.weightings import Decision


class Diagnostics(NamedTuple):
    """Health of one aggregation; with grouped weights, one entry for each group.

    Tasks that the policy "drop" leaves out do not count. Of none, all is NaN or 0.

    Attributes:
        weight_sum: Σ w_i; in [0, 1] for Gradient Agreement, [-1, 1] without a task's own share.
        smallest_weight: min w_i.
        negative_share: share of the tasks whose weight is negative.
        effective_tasks: (Σ|w_i|)² / Σ w_i², between 1 and n; 0 where all weights are zero.
        cancellation: ‖Σ g_i‖ / Σ ‖g_i‖ of the signals: 1 where they point one way, 0 where they
            cancel; NaN from an engine that does not know the ‖g_i‖, as the correlation below.
        update_norm: ‖update‖.
        update_to_mean: ‖update‖ / ‖mean direction‖; NaN where the mean is zero, or the directions
            are not the signal, since their mean is never formed.
        norm_correlation: Pearson correlation of w_i with ‖g_i‖²; NaN where either is constant.
        smallest_agreement: min u_i · d / ‖d‖ over the tasks that are not zero; u_i = g_i / ‖g_i‖,
            d the update. Below 0 a task is ascended. NaN, as the next two, where the Gram matrix
            was not measured, the directions are not the signal, or d is zero up to rounding.
        largest_agreement: max u_i · d / ‖d‖ likewise.
        agreement_spread: their standard deviation: 0 where all tasks agree alike with the update.
        degenerate: whether the scores cancelled and the fallback weights were used.
        nonfinite: the tasks ``[n]`` with a NaN or infinite entry.
    """

    weight_sum: Float[Tensor, "*groups"]
    smallest_weight: Float[Tensor, "*groups"]
    negative_share: Float[Tensor, "*groups"]
    effective_tasks: Float[Tensor, "*groups"]
    cancellation: Float[Tensor, "*groups"]
    update_norm: Float[Tensor, ""]
    update_to_mean: Float[Tensor, ""]
    norm_correlation: Float[Tensor, "*groups"]
    smallest_agreement: Float[Tensor, "*groups"]
    largest_agreement: Float[Tensor, "*groups"]
    agreement_spread: Float[Tensor, "*groups"]
    degenerate: Bool[Tensor, "*groups"]
    nonfinite: Bool[Tensor, " n"]

    def log(self) -> dict[str, float]:
        """A flat dict of floats for TensorBoard, W&B or MLflow; groups are averaged.

        Reads the tensors on the host. What is NaN because it is undefined or was not measured is
        left out of the average, and of the dict. ``update_norm`` always stays: NaN there means that
        the batch contained NaN or inf.

        >>> import gradagree_opt as ga
        >>> stack = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> logged = ga.GradientAgreement().aggregate(stack).diagnostics.log()
        >>> logged["weight_sum"], logged["nonfinite_tasks"]
        (1.0, 0.0)
        """
        dtype = torch.get_default_dtype()
        values = {
            name: value.to(dtype).nanmean()
            for name, value in self._asdict().items()
            if name != "nonfinite"
        }
        values["nonfinite_tasks"] = self.nonfinite.sum().to(dtype)
        numbers = torch.stack(list(values.values())).tolist()
        logged = dict(zip(values, numbers, strict=True))
        return {name: x for name, x in logged.items() if x == x or name == "update_norm"}


def diagnose(
    statistics: Statistics,
    decision: Decision,
    nonfinite: Bool[Tensor, " n"],
    update_norm: Float[Tensor, ""],
    /,
    *,
    signal_is_direction: bool,
) -> Diagnostics:
    """Diagnostics of a decision, from the statistics alone.

    Args:
        statistics: of the signals.
        decision: on their weights.
        nonfinite: the tasks with a NaN or infinite entry.
        update_norm: ‖update‖.
        signal_is_direction: the update is the combination of what was measured.
    """
    weights, norms = decision.weights, statistics.squared_norms
    if norms is None:
        norms = torch.full_like(weights, torch.nan)
    shares = _in_units(weights)
    size, squares = shares.abs().sum(-1), shares.square().sum(-1)
    total = statistics.row_sums.sum(-1).clamp(min=0).sqrt()
    lengths = norms.sqrt().sum(-1)
    unknown = torch.full_like(size, torch.nan)
    mean_norm = _mean_norm(statistics) if signal_is_direction else torch.nan * update_norm
    agreements = _agreements(statistics, weights) if signal_is_direction else None
    smallest, largest, spread = agreements or (unknown, unknown, unknown)
    active = statistics.active
    count = active.sum()
    least = weights.masked_fill(~active, torch.inf).amin(-1)
    return Diagnostics(
        weight_sum=weights.sum(-1),
        smallest_weight=torch.where(count > 0, least, torch.nan),
        negative_share=(weights < 0).sum(-1).to(weights.dtype) / count,
        effective_tasks=size.square() / or_one(squares),
        cancellation=total / or_one(lengths),
        update_norm=update_norm,
        update_to_mean=torch.where(mean_norm > 0, update_norm / mean_norm, torch.nan),
        norm_correlation=_correlation(torch.stack([weights, norms]), active),
        smallest_agreement=smallest,
        largest_agreement=largest,
        agreement_spread=spread,
        degenerate=decision.degenerate,
        nonfinite=nonfinite,
    )


def undescribed(like: Float[Tensor, "*groups"], /) -> Diagnostics:
    """Diagnostics that say nothing: NaN in all of their places."""
    return Diagnostics(*[torch.full_like(like, torch.nan)] * len(Diagnostics._fields))


def update_rounding(statistics: Statistics, decision: Decision, /) -> Float[Tensor, ""]:
    """The most that rounding leaves of ‖Σ w_i g_i‖ where terms cancel; 0 if no ‖g_i‖ is known.

    An update that is no longer than this is noise, and is not to be rescaled.
    """
    norms = statistics.squared_norms
    if norms is None:
        return torch.zeros_like(statistics.scale).sum()
    errors = 8 * torch.finfo(norms.dtype).eps * norms.sqrt()  # unscaled: a norm may overflow
    terms = decision.weights.abs() * errors * statistics.scale.unsqueeze(-1)
    return terms.sum()


def _agreements(statistics: Statistics, weights: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Smallest, largest and deviation of u_i · d / ‖d‖, from d = Σ w_j ‖g_j‖ u_j."""
    cosines, norms, nonzero = statistics.cosines, statistics.relative_norms, statistics.nonzero
    if cosines is None or norms is None or nonzero is None:
        return None
    shares = weights * norms
    products = (cosines * shares.unsqueeze(-2)).sum(-1)  # autocast would round a matrix product
    square = (shares * products).sum(-1)
    rounding = 8 * torch.finfo(shares.dtype).eps * shares.abs().sum(-1).square()
    length = torch.where(square > rounding, square.sqrt(), torch.nan)
    zero, count = ~nonzero, nonzero.sum(-1)
    mean = (products.sum(-1) / count).unsqueeze(-1)  # of a zero signal both are 0
    variance = (products - mean).square().masked_fill(zero, 0).sum(-1) / count
    smallest = products.masked_fill(zero, torch.inf).amin(-1)
    largest = products.masked_fill(zero, -torch.inf).amax(-1)
    return smallest / length, largest / length, variance.sqrt() / length


def _mean_norm(statistics: Statistics) -> Float[Tensor, ""]:
    """‖Σ g_i / n‖ over all groups, from ‖Σ g_i‖² = Σ s_i."""
    norms = statistics.row_sums.sum(-1).clamp(min=0).sqrt() * statistics.scale
    if norms.ndim:  # of groups
        largest = or_one(norms.amax())
        norms = largest * torch.linalg.vector_norm(norms / largest)
    return norms / statistics.active.sum()


def _correlation(
    pair: Float[Tensor, "2 *groups n"], active: Bool[Tensor, " n"]
) -> Float[Tensor, "*groups"]:
    """Pearson's correlation of two rows over the active tasks; the others' entries are zeros.

    Values that differ by rounding alone are constant.
    """
    deviations = pair - pair.sum(-1, keepdim=True) / active.sum()
    rounding = 4 * torch.finfo(pair.dtype).eps * pair.abs().amax(-1, keepdim=True)
    deviations = _in_units(deviations.masked_fill((deviations.abs() <= rounding) | ~active, 0))
    return deviations.prod(0).sum(-1) / deviations.square().sum(-1).prod(0).sqrt()


def _in_units(rows: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Each row over the power of two below its largest entry, so that its squares are in range."""
    return rows / or_one(power_of_two(rows.abs().amax(-1, keepdim=True)))


def check_some_task(diagnostics: Diagnostics, nonfinite: str, /) -> None:
    """One host synchronisation under "drop": raises where no task is left to step on.

    Args:
        diagnostics: of the aggregation.
        nonfinite: the aggregator's policy.

    Raises:
        ValueError: a step of zeros would still be one of weight decay and momentum.
    """
    if nonfinite == "drop" and bool(diagnostics.nonfinite.all()):
        raise ValueError(
            "expected a task that is finite, found NaN or inf in all "
            f"{len(diagnostics.nonfinite)}, which nonfinite='drop' leaves out; skip the step, and "
            "if the next ones end here too, look for NaN in the parameters"
        )


def _read(values: Tensor) -> list[float]:
    """The values on the host, or one sentence where vmap or the meta device has none to show."""
    try:
        return values.tolist()
    except RuntimeError as error:
        if not (values.is_meta or is_wrapped(values)):
            raise
        raise ValueError(
            "expected tensors whose values can be looked at, found those of vmap, functionalize or "
            "the meta device; give nonfinite='propagate', and no degenerate='raise'"
        ) from error


def complaint(
    diagnostics: Diagnostics,
    /,
    *,
    finite: bool,
    agreement: bool,
    name: Callable[[list[int]], str],
) -> str | None:
    """What the policies for bad tasks raise, in one sentence; None where all is well.

    One host synchronisation, or none if nothing is asked for.

    Args:
        diagnostics: of the aggregation.
        finite: whether it complains of a task or an update that is not finite.
        agreement: whether it complains of scores that cancel.
        name: from the numbers of tasks to what the sentence calls them.

    Raises:
        ValueError: something is asked for, and a transform or the meta device hides it.
    """
    flags = []
    if finite:
        flags += [diagnostics.update_norm.reshape(1), diagnostics.nonfinite]
    if agreement:
        flags.append(diagnostics.degenerate.reshape(-1))
    numbers = _read(torch.cat(flags)) if flags else []  # one operation: on a GPU each costs
    lost = finite and not math.isfinite(numbers.pop(0))
    if not lost and not any(numbers):
        return None
    tasks = diagnostics.nonfinite.nonzero().flatten().tolist()
    if finite and tasks:
        return (
            f"expected finite values for every task, found NaN or inf in tasks {name(tasks)}; "
            "lower the inner or the outer rate, or give nonfinite='drop' to leave such tasks out"
        )
    if agreement and diagnostics.degenerate.any():
        return (
            "expected tasks that agree or disagree, found scores that cancel to zero (all signals "
            "zero, Σ g_i = 0, or no score left by negative='clip'); give degenerate='uniform' or "
            "'zero' for a fallback"
        )
    return (
        "expected a finite update, found NaN or inf although every loss and signal looked at is "
        "finite; nonfinite='drop' leaves a task of such a gradient out, engine='stacked' names it, "
        "and float64 signals hold weights of norms that lie too far apart, or of a small damping"
    )
