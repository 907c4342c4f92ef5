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
        scores: what the weights come from, shaped like them, in squared units of the signal; NaN
            where the weights come from none, and none were measured.
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
    """Statistics of a batch, its non-finite tasks, and the group of every leaf.

    ``scaled``: whether sums are taken in units of the largest entry, those of the update too.
    ``signal_is_direction``: the directions are what was measured, so that the statistics hold the
    norm of their mean.
    ``total_norm``: ‖Σ_j g_j‖ where it is known and match_norm asks for nothing else, or None.
    ``own``: the place of this rank's tasks among those of all ranks; None where there is one.
    ``total``: Σ_j g_j of all ranks, flat, where all tasks weigh the same: it tells the update.
    """

    statistics: Statistics
    nonfinite: Bool[Tensor, " n"]
    groups: list[int] | None
    scaled: bool = True
    signal_is_direction: bool = True
    total_norm: Tensor | None = None
    own: slice | None = None
    total: Tensor | None = None


class Decided(NamedTuple):
    """What was decided of a batch.

    ``reference``: of the method whose length the update gets, or None.
    """

    decision: Decision
    reference: Decision | None = None
