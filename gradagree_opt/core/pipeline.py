"""The steps of an aggregation, one by one: what engines and loops run, each in its own order.

An engine that never holds the directions as a stack (a vjp, a backward pass of the weighted loss)
runs the same steps as :meth:`gradagree_opt.Aggregator.aggregate`.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.combination import Combination
from gradagree_opt.core.deferred import describe
from gradagree_opt.core.diagnostics import undescribed
from gradagree_opt.core.header import TaskForm
from gradagree_opt.core.matching import factor_to, reference_of, rescaled
from gradagree_opt.core.ranks import Ranks
from gradagree_opt.core.results import Aggregation, Combine, Decided, Measured
from gradagree_opt.core.scopes import Scope, group_indices, measure_by_group
from gradagree_opt.core.stacks import PyTree, full_precision, leaf_paths, leaves_of, tree_norm
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.summed import Summed
from gradagree_opt.core.weightings import Decision, Need, Weigh, check_weighting, decide, needs_of
from gradagree_opt.options import check_choice

Nonfinite = Literal["raise", "drop", "propagate"]

APipeline = TypeVar("APipeline", bound="Pipeline")


class Pipeline:
    """Measure the signals, decide on weights, combine the directions, and answer.

    The options are those of :class:`gradagree_opt.Aggregator`.
    """

    def __init__(
        self,
        weighting: Weigh,
        *,
        scope: Scope = "global",
        match_norm: "Literal['mean'] | Pipeline | None" = None,
        nonfinite: Nonfinite = "raise",
        generator: torch.Generator | None = None,
    ) -> None:
        check_weighting(weighting)
        if not callable(scope):
            check_choice("scope", scope, ("global", "leaf"))
        self.reference = reference_of(match_norm, scope)
        check_choice("nonfinite", nonfinite, ("raise", "drop", "propagate"))
        if generator is not None:
            check_generator(generator)
        self.weighting = weighting
        self.scope = scope
        self.match_norm = match_norm
        self.nonfinite = nonfinite
        self.generator = generator
        self.describes = True
        self.drawn: Tensor | None = None
        self.ranks: Ranks | None = None
        if generator is None and isinstance(match_norm, Pipeline):
            self.generator = match_norm.generator

    @property
    def needs(self) -> frozenset[Need]:
        """Names of the optional statistics that its weightings read."""
        own = needs_of(self.weighting)
        return own if self.reference is None else own | needs_of(self.reference)

    @property
    def weightings(self) -> list[Weigh]:
        """Its own weighting and, under match_norm, the one whose update has the length to match."""
        return [self.weighting] if self.reference is None else [self.weighting, self.reference]

    def measure(
        self,
        signal: PyTree,
        /,
        *,
        directions: PyTree | None = None,
        nonfinite: Bool[Tensor, " n"] | None = None,
        scaled: bool = True,
    ) -> Measured:
        """The statistics of a task-stacked signal, from which :meth:`decide` finds the weights.

        Args:
            signal: task-stacked pytree, every leaf ``[n, *shape]``.
            directions: task-stacked pytree, of any number of tasks, with the shapes and dtypes of
                what is combined; None where that is the signal.
            nonfinite: tasks already known to be non-finite; "drop" gives them weight 0 and wants
                zeros in place of their signals.
            scaled: False skips the scaling, which is faster; where it would have been needed, all
                tasks are marked as not finite.
        """
        groups = group_indices(signal, self.scope)
        leaves = [leaf.detach() for leaf in leaves_of(signal)]
        if self.ranks is not None:
            return self.ranks.measure(
                leaves,
                groups,
                self.weightings,
                directions=None if directions is None else leaves_of(directions),
                nonfinite=nonfinite,
                drop=self.nonfinite == "drop",
                draw=self.draw,
                options=[repr(self), f"groups {groups}", *leaf_paths(signal)],
            )
        n = leaves[0].shape[0]
        if nonfinite is not None and self.nonfinite == "drop":
            active = ~nonfinite
        else:
            active = torch.ones(n, dtype=torch.bool, device=leaves[0].device)
        statistics = measure_by_group(leaves, groups, active, self.needs, scaled=scaled)
        statistics = self.with_draws(statistics)
        found = ~statistics.finite
        bad = found if nonfinite is None else nonfinite | found
        return Measured(statistics, bad, groups, scaled, signal_is_direction=directions is None)

    def decide(self, measured: Measured, /) -> Decided:
        """The weights, and those of the method whose length the update gets.

        Args:
            measured: result of :meth:`measure`.
        """
        statistics = measured.statistics
        with full_precision(statistics.row_sums.device):
            each = [decide(weighting, statistics) for weighting in self.weightings]
        if self.ranks is not None:
            told = self.ranks.decided([tensor for decision in each for tensor in decision])
            each = [Decision(*told[at : at + 3]) for at in range(0, len(told), 3)]
        return Decided(*each)

    def combine(
        self, measured: Measured, decided: Decided, combine_directions: Combine, /
    ) -> tuple[PyTree, Tensor | None, Decided]:
        """The update, its norm (None if nothing needs it), and the decision with the final weights.

        Args:
            measured, decided: results of :meth:`measure` and :meth:`decide`.
            combine_directions: linear map from weights to Σ_i w_i · direction_i.
        """
        matched, stack = decided.reference, None
        if matched is not None and isinstance(combine_directions, Combination):
            # The dtype of a coarse stack may not hold the update before that has its length.
            stack = combine_directions.stack if combine_directions.is_coarse else None
        if self.ranks is not None:
            combine_directions = Summed(
                self.ranks, combine_directions, measured, wide=stack is not None
            )
        elif stack is not None:
            combine_directions = Combination(stack).wide
        if matched is None and not self.describes:
            return combine_directions(decided.decision.weights, measured.groups), None, decided
        update, norm = with_norm(combine_directions, decided.decision.weights, measured)
        if matched is None:
            return update, norm, decided
        if measured.total_norm is None:
            _, length = with_norm(combine_directions, matched.weights, measured)
        else:
            length = measured.total_norm * matched.weights.amax()
        factor = factor_to(length, norm, decided, measured)
        if self.ranks is not None:
            factor = self.ranks.of_first(factor)
        update, norm, decided = rescaled(update, norm, decided, factor)
        if stack is not None:
            update = tree_map(lambda leaf, row: leaf.to(row.dtype), update, stack)
        return update, norm, decided

    def answer(
        self, measured: Measured, decided: Decided, update: PyTree, norm: Tensor | None, /
    ) -> Aggregation:
        """The result of the aggregation, with the weights and scores of this rank's tasks."""
        statistics, decision = measured.statistics, decided.decision
        if norm is None or not self.describes:
            diagnostics = undescribed(statistics.scale)
        else:
            diagnostics = describe(
                statistics,
                decision,
                measured.nonfinite,
                norm,
                signal_is_direction=measured.signal_is_direction,
            )
        own = slice(None) if measured.own is None else measured.own
        return Aggregation(
            update, decision.weights[..., own], decision.scores[..., own], diagnostics
        )

    def apply(self, measured: Measured, combine_directions: Combine, /) -> Aggregation:
        """Decides on the weights and combines the directions: every step after :meth:`measure`.

        Args:
            measured, combine_directions: as in :meth:`combine`.
        """
        decided = self.decide(measured)
        update, norm, decided = self.combine(measured, decided, combine_directions)
        return self.answer(measured, decided, update, norm)

    def for_batch(self: APipeline, n: int, /) -> APipeline:
        """A copy with random numbers drawn for n tasks; itself if its weighting needs none."""
        if self.drawn is not None or self.ranks is not None or "draws" not in self.needs:
            return self
        return self.holding(self.draw(n))

    def holding(self: APipeline, draws: Float[Tensor, " n"], /) -> APipeline:
        """A copy that uses these random numbers: vmap and torch.compile cannot draw their own."""
        held = copy.copy(self)
        held.drawn = draws
        return held

    def with_draws(self, statistics: Statistics, /) -> Statistics:
        """The statistics, with random numbers for a weighting that needs some."""
        draws = self.for_batch(len(statistics.active)).drawn
        if draws is None:
            return statistics
        return statistics._replace(draws=draws.to(statistics.row_sums))

    def draw(self, n: int, /) -> Float[Tensor, " n"]:
        """Random numbers for one aggregation of n tasks, for a weighting that needs some."""
        device = self.generator.device if self.generator is not None else None
        return torch.empty(n, device=device).exponential_(generator=self.generator)

    @property
    def fewest(self) -> int:
        """The smallest number of tasks that is accepted: one, or zero on one of several ranks."""
        return 1 if self.ranks is None else 0

    def step_of_ranks(
        self, batch: object = None, form: TaskForm = TaskForm.UNKNOWN
    ) -> AbstractContextManager[None]:
        """A context for one step: what fails on one rank before all have met fails on all."""
        return nullcontext() if self.ranks is None else self.ranks.step(batch, form)

    def of_one_process(self: APipeline) -> APipeline:
        """A copy that aggregates the tasks of this rank alone."""
        alone = copy.copy(self)
        alone.ranks = None
        return alone


def with_norm(
    combine_directions: Combine, weights: Float[Tensor, "*groups n"], measured: Measured, /
) -> tuple[PyTree, Float[Tensor, ""]]:
    """The update of these weights and its norm, which some combinations find in the same pass."""
    if isinstance(combine_directions, (Combination, Summed)):
        return combine_directions.and_norm(weights, measured)
    update = combine_directions(weights, measured.groups)
    if measured.waits and torch.isfinite(norm := tree_norm(update, scaled=False)):
        return update, norm
    return update, tree_norm(update, scaled=measured.scaled)


def check_generator(generator: object, /) -> None:
    """Raises a TypeError unless it is a generator of torch's."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"expected a torch.Generator, found {type(generator).__name__}; "
            "pass torch.Generator().manual_seed(seed)"
        )


def without_diagnostics(aggregator: APipeline, /) -> APipeline:
    """A copy whose diagnostics are NaN, for steps whose diagnostics nobody reads.

    On a GPU, diagnostics are a third of the operations of a small step.

    >>> import gradagree_opt as ga
    >>> stack = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> quiet = without_diagnostics(ga.Mean())
    >>> quiet.aggregate_unchecked(stack).diagnostics.weight_sum
    tensor(nan)
    """
    quiet = copy.copy(aggregator)
    quiet.describes = False
    return quiet
