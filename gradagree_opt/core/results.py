"""What the steps of an aggregation hand on, and what it answers."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.diagnostics import Diagnostics
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.weightings import Decision

Combine = Callable[[Tensor, list[int] | None], PyTree]
"""From weights ``[n]``, or ``[groups, n]`` and the group of each leaf, to Σ_i w_i · direction_i."""


class Aggregation(NamedTuple):
    """Result of one aggregation of n tasks.

    Attributes:
        update: Σ_i w_i · direction_i, a pytree without the task axis: what an optimizer subtracts.
        weights: ``[n]``, or ``[groups, n]`` where the scope is not "global".
        scores: what the weights are computed from, in their shape and in squared units of the
            signal; NaN if the weights need no scores and none were measured.
        diagnostics: plain tensors that say how the tasks agreed, computed when first looked at.
    """

    update: PyTree
    weights: Float[Tensor, "*groups n"]
    scores: Float[Tensor, "*groups n"]
    diagnostics: Diagnostics


class CollectedTasks(NamedTuple):
    """An :class:`Aggregation` of tasks that a loop has collected, with their losses.

    Attributes:
        update, weights, scores, diagnostics: as in :class:`Aggregation`.
        losses: ``[n]``, detached, in the order of the tasks; None in the Reptile form, without any.
    """

    update: PyTree
    weights: Float[Tensor, "*groups n"]
    scores: Float[Tensor, "*groups n"]
    diagnostics: Diagnostics
    losses: Float[Tensor, " n"] | None


class Measured(NamedTuple):
    """What was measured of a batch.

    Attributes:
        statistics: of the signals.
        nonfinite: the tasks ``[n]`` with a NaN or infinite entry.
        groups: the group of every leaf; None for the global scope.
        scaled: whether sums are taken in units of the largest entry, those of the update too.
        signal_is_direction: whether the signals are also what is combined, so that the statistics
            hold the norm of the mean direction.
        total_norm: ‖Σ_j g_j‖, if it is known and is all that match_norm needs; else None.
        own: where this rank's tasks are among those of all ranks; None on one process.
        total: Σ_j g_j over all ranks, flat, if all tasks have the same weight: the update is a
            multiple of it. Else None.
        waits: whether the host may wait for the device to see that a norm needs no scaling.
    """

    statistics: Statistics
    nonfinite: Bool[Tensor, " n"]
    groups: list[int] | None
    scaled: bool = True
    signal_is_direction: bool = True
    total_norm: Tensor | None = None
    own: slice | None = None
    total: Tensor | None = None
    waits: bool = False


class Decided(NamedTuple):
    """The decision on a batch, and that of the method whose update length match_norm takes."""

    decision: Decision
    reference: Decision | None = None
