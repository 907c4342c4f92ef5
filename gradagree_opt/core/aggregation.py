"""Aggregator: measure the signals, decide on weights, apply them to the directions.

The three steps are methods of their own, so that an engine that never holds the directions as a
stack (a vjp, a backward pass of the weighted loss) runs the same ones.
"""

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.combination import Combination, with_norm
from gradagree_opt.core.deferred import describe
from gradagree_opt.core.diagnostics import (
    troubled,
    undescribed,
    update_rounding,
    verify,
)
from gradagree_opt.core.ranks import Ranks
from gradagree_opt.core.results import Aggregation, Combine, Measured
from gradagree_opt.core.scopes import Scope, check_signal, group_indices, measure_by_group
from gradagree_opt.core.stacks import (
    PyTree,
    check_stack,
    full_precision,
    leaf_paths,
    leaves_of,
    mask_rows,
    nonfinite_tasks,
)
from gradagree_opt.core.weightings import (
    Decision,
    Need,
    UniformWeighting,
    Weigh,
    check_weighting,
    decide,
    needs_of,
)
from gradagree_opt.options import check_choice

AN_AGGREGATOR = "an aggregator as gradagree_opt.Sum()"
"""What match_norm takes besides words, for the messages."""

Nonfinite = Literal["raise", "drop", "propagate"]


class Aggregator:
    """A weighting, and how its weights are applied.

    Args:
        weighting: from statistics to weights; a function that reads row sums alone will do.
        scope: "global", one weight a task; "leaf", one for each parameter tensor; or a callable
            from the path of a leaf to the name of its group.
        match_norm: None, "mean" or an aggregator of the same scope: rescale the update to the norm
            of that method's.
        nonfinite: "raise" names the tasks with NaN or inf, "drop" gives them weight 0,
            "propagate" looks at nothing (no host synchronisation).
        generator: source of randomness of a weighting that draws.

    Raises:
        TypeError, ValueError: the weighting is none, needs what there is not, or an option has none
            of its values.
    """

    def __init__(
        self,
        weighting: Weigh,
        *,
        scope: Scope = "global",
        match_norm: "Literal['mean'] | Aggregator | None" = None,
        nonfinite: Nonfinite = "raise",
        generator: torch.Generator | None = None,
    ) -> None:
        check_weighting(weighting)
        if not callable(scope):
            check_choice("scope", scope, ("global", "leaf"))
        self.reference = _reference(match_norm, scope)
        check_choice("nonfinite", nonfinite, ("raise", "drop", "propagate"))
        self.weighting = weighting
        self.scope = scope
        self.match_norm = match_norm
        self.nonfinite = nonfinite
        self.generator = generator
        self.describes = True
        self.ranks: Ranks | None = None
        if generator is None and isinstance(match_norm, Aggregator):
            self.generator = match_norm.generator

    @property
    def needs(self) -> frozenset[Need]:
        """Names of the optional statistics that are measured for it."""
        own = needs_of(self.weighting)
        return own if self.reference is None else own | needs_of(self.reference)

    def __repr__(self) -> str:
        """What the constructor takes, but for its defaults."""
        options = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, getattr(self.weighting, name, parameter.default))
            if parameter.default is parameter.empty:
                options.append(repr(value))
            elif value != parameter.default:
                options.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(options)})"

    def __call__(self, grads: PyTree, /) -> PyTree:
        """Σ_i w_i g_i of task-stacked gradients: :meth:`aggregate`, the update alone."""
        return self.aggregate(grads).update

    def aggregate(self, directions: PyTree, /, signal: PyTree | None = None) -> Aggregation:
        """Weights the tasks by their signals and combines their directions.

        Args:
            directions: task-stacked pytree, every leaf ``[n, *shape]``: what is combined.
            signal: task-stacked pytree that agreement is measured on; the directions if None.

        Returns:
            The update (same structure and dtypes as the directions, without the task axis), the
            weights, the scores and the diagnostics.

        Raises:
            ValueError: the task axes differ or are empty; a task is non-finite under
                nonfinite="raise"; the scores cancel under degenerate="raise".
            TypeError: a leaf is not a floating-point tensor.

        Source: Eshratifar et al. 2018 (arXiv:1810.08178), algorithm 1.

        >>> import gradagree_opt as ga
        >>> grads = {"w": torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])}
        >>> result = ga.GradientAgreement().aggregate(grads)
        >>> result.weights
        tensor([ 0.3333,  0.3333, -0.3333])
        >>> result.update
        {'w': tensor([1., 0.])}
        """
        with self.step_of_ranks():
            return self._checked(directions, signal)

    def _checked(self, directions: PyTree, signal: PyTree | None) -> Aggregation:
        n = self._check(directions, signal)
        draws = self.draw(n)
        # The look that is due finds this sound but at extreme scales. What reads more than row sums
        # may depend on the scale, or remember what it has seen.
        once = self.needs & {"gramian", "directions"} or self.ranks is not None
        if self.nonfinite == "raise" and not once:
            result = self._aggregate(directions, signal, n, draws=draws, scaled=False)
            if self.is_sound(result):
                return result
        result = self._aggregate(directions, signal, n, draws=draws)
        self.verify(result)
        return result

    def aggregate_unchecked(
        self,
        directions: PyTree,
        signal: PyTree | None = None,
        *,
        nonfinite: Bool[Tensor, " n"] | None = None,
        draws: Float[Tensor, " n"] | None = None,
        scaled: bool = True,
    ) -> Aggregation:
        """:meth:`aggregate` without the look at its result: runs under vmap and torch.compile.

        Args:
            directions: task-stacked pytree.
            signal: task-stacked pytree, or None.
            nonfinite: tasks known to be non-finite by other means, as by their losses.
            draws: result of :meth:`draw`, where it was called beforehand.
            scaled: as in :meth:`measure`.
        """
        n = self._check(directions, signal)
        return self._aggregate(
            directions, signal, n, nonfinite=nonfinite, draws=draws, scaled=scaled
        )

    def step_of_ranks(self, batch: object = None) -> AbstractContextManager[None]:
        """Around a step of several ranks: what fails in it before they meet fails on all."""
        return nullcontext() if self.ranks is None else self.ranks.step(batch)

    def of_one_process(self) -> "Aggregator":
        """The same, of the tasks of this rank alone."""
        alone = copy.copy(self)
        alone.ranks = None
        return alone

    def _check(self, directions: PyTree, signal: PyTree | None) -> int:
        name = "directions" if signal is not None else "gradients"
        return check_stack(directions, name, least=self.fewest)

    @property
    def fewest(self) -> int:
        """Fewest tasks of an aggregation here: one, or none on one of several ranks."""
        return 1 if self.ranks is None else 0

    def _aggregate(
        self,
        directions: PyTree,
        signal: PyTree | None,
        n: int,
        *,
        nonfinite: Bool[Tensor, " n"] | None = None,
        draws: Float[Tensor, " n"] | None = None,
        scaled: bool = True,
    ) -> Aggregation:
        def aggregate(directions: PyTree, signal: PyTree | None) -> Aggregation:
            return self._combined(
                directions, signal, n, nonfinite=nonfinite, draws=draws, scaled=scaled
            )

        if self.ranks is None:
            return aggregate(directions, signal)
        return self.ranks.by_parts(directions, signal, aggregate)

    def _combined(
        self,
        directions: PyTree,
        signal: PyTree | None,
        n: int,
        *,
        nonfinite: Bool[Tensor, " n"] | None,
        draws: Float[Tensor, " n"] | None,
        scaled: bool,
    ) -> Aggregation:
        if signal is not None:
            check_signal(signal, directions, n, self.scope)
        if signal is not None or self.nonfinite == "drop":
            found = nonfinite_tasks(directions, signal)
            nonfinite = found if nonfinite is None else nonfinite | found
        if nonfinite is not None and self.ranks is not None:
            nonfinite = self.ranks.on_any_shard(nonfinite)
        if nonfinite is not None and self.nonfinite == "drop":
            directions = mask_rows(directions, ~nonfinite)
            signal = None if signal is None else mask_rows(signal, ~nonfinite)
        measured = self.measure(
            directions if signal is None else signal,
            nonfinite=nonfinite,
            draws=draws,
            scaled=scaled,
        )
        return self.apply(
            measured,
            Combination(directions, scaled),
            signal_is_direction=signal is None,
        )

    def measure(
        self,
        signal: PyTree,
        /,
        *,
        nonfinite: Bool[Tensor, " n"] | None = None,
        draws: Float[Tensor, " n"] | None = None,
        scaled: bool = True,
    ) -> Measured:
        """Statistics of a task-stacked signal: what :meth:`apply` needs to know of it.

        Args:
            signal: task-stacked pytree, every leaf ``[n, *shape]``.
            nonfinite: tasks already known to be non-finite; "drop" gives them weight 0 and wants
                zeros in place of their signals.
            draws: result of :meth:`draw`, where it was called beforehand.
            scaled: False saves the scaling, and marks all tasks as not finite where it was needed.
        """
        groups = group_indices(signal, self.scope)
        if self.ranks is not None:
            return self.ranks.measure(
                [leaf.detach() for leaf in leaves_of(signal)],
                groups,
                self.needs,
                nonfinite=nonfinite,
                drop=self.nonfinite == "drop",
                draw=self._draw,
                options=[repr(self), f"groups {groups}", *leaf_paths(signal)],
            )
        first = leaves_of(signal)[0]
        n = first.shape[0]
        if nonfinite is not None and self.nonfinite == "drop":
            active = ~nonfinite
        else:
            active = torch.ones(n, dtype=torch.bool, device=first.device)
        statistics = measure_by_group(signal, groups, active, self.needs, scaled=scaled)
        if draws is None:
            draws = self.draw(n)
        if draws is not None:
            statistics = statistics._replace(draws=draws.to(statistics.row_sums))
        found = ~statistics.finite
        return Measured(
            statistics, found if nonfinite is None else nonfinite | found, groups, scaled
        )

    def apply(
        self, measured: Measured, combine_directions: Combine, /, *, signal_is_direction: bool
    ) -> Aggregation:
        """Decides on the weights and combines the directions with them.

        Args:
            measured: result of :meth:`measure`.
            combine_directions: linear map from weights to Σ_i w_i · direction_i.
            signal_is_direction: the directions are what was measured, so the statistics hold the
                norm of their mean.
        """
        statistics = measured.statistics
        if self.ranks is not None and measured.own is not None:
            combine_directions = self.ranks.summed(combine_directions, measured.own)
        decision, reference, signal_is_direction = self._decide(measured, signal_is_direction)
        norm = None
        if self.describes or reference is not None:
            combined = with_norm(combine_directions, measured)
            update, norm = combined(decision.weights)
        else:
            update = combine_directions(decision.weights, measured.groups)
        if norm is not None and reference is not None:
            _, target_norm = combined(reference.weights)
            there = norm > (update_rounding(statistics, decision) if signal_is_direction else 0)
            factor = torch.where(there, target_norm / norm, torch.ones_like(norm))
            update = tree_map(lambda leaf: (leaf * factor).to(leaf.dtype), update)
            decision = decision._replace(weights=decision.weights * factor)
            norm = norm * factor
        diagnostics = undescribed(statistics.scale)
        if norm is not None and self.describes:
            diagnostics = describe(
                statistics,
                decision,
                measured.nonfinite,
                norm,
                signal_is_direction=signal_is_direction,
            )
        own = slice(None) if measured.own is None else measured.own
        return Aggregation(
            update, decision.weights[..., own], decision.scores[..., own], diagnostics
        )

    def _decide(
        self, measured: Measured, signal_is_direction: bool
    ) -> tuple[Decision, Decision | None, bool]:
        """The decision, that of the reference, and whether the directions are what was measured."""
        statistics = measured.statistics

        def decisions() -> list[Tensor]:
            with full_precision(statistics.row_sums.device):
                each = [decide(self.weighting, statistics)]
                if self.reference is not None:
                    each.append(decide(self.reference, statistics))
            return [tensor for decision in each for tensor in decision]

        if self.ranks is None or measured.own is None:
            tensors = decisions()
        else:
            tensors, apart = self.ranks.decided(decisions, measured.own, not signal_is_direction)
            signal_is_direction = not apart
        reference = Decision(*tensors[3:]) if tensors[3:] else None
        return Decision(*tensors[:3]), reference, signal_is_direction

    def is_sound(self, result: Aggregation, /) -> bool:
        """One host synchronisation: whether no policy for bad tasks has anything to raise."""
        return not troubled(result.diagnostics, **self._policies())

    def verify(self, result: Aggregation, /) -> None:
        """One host synchronisation: raises where the policies for bad tasks say so.

        Raises:
            ValueError: a task or the update is non-finite under nonfinite="raise", or the scores
                cancel under degenerate="raise".
        """
        name = str if self.ranks is None else self.ranks.name
        verify(result.diagnostics, name=name, **self._policies())

    def _policies(self) -> dict[str, bool]:
        return {
            "finite": self.nonfinite == "raise",
            "agreement": getattr(self.weighting, "degenerate", None) == "raise",
        }

    def draw(self, n: int, /) -> Float[Tensor, " n"] | None:
        """The random numbers of one aggregation of n tasks.

        None if the weighting needs none, or they are drawn for the tasks of all ranks.
        """
        return None if "draws" not in self.needs or self.ranks is not None else self._draw(n)

    def _draw(self, n: int) -> Float[Tensor, " n"]:
        device = self.generator.device if self.generator is not None else None
        return torch.empty(n, device=device).exponential_(generator=self.generator)


def _reference(method: Literal["mean"] | Aggregator | None, scope: Scope) -> Weigh | None:
    """The weighting whose update has the length that is matched."""
    if not isinstance(method, Aggregator):
        check_choice("match_norm", method, (None, "mean"), AN_AGGREGATOR)
        return None if method is None else UniformWeighting()
    if method.reference is not None or "directions" in method.needs:
        raise ValueError(
            "expected match_norm with an aggregator whose weights give its length, found "
            f"{method}; give it without match_norm, and none of TorchJD's that takes the matrix"
        )
    if method.ranks is not None:
        raise ValueError(
            "expected match_norm with an aggregator of one process, found one of several ranks; "
            "give ga.distributed the aggregator that has the match_norm"
        )
    if method.scope != scope:
        raise ValueError(
            f"expected match_norm with an aggregator of scope {scope!r}, found {method.scope!r}; "
            "give both the same"
        )
    return method.weighting


def without_diagnostics(aggregator: Aggregator, /) -> Aggregator:
    """The same aggregator, whose diagnostics are NaN: for steps that nobody looks at.

    On a GPU they are a third of the operations of a small step.

    >>> import gradagree_opt as ga
    >>> stack = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> quiet = without_diagnostics(ga.Mean())
    >>> quiet.aggregate_unchecked(stack).diagnostics.weight_sum
    tensor(nan)
    """
    quiet = copy.copy(aggregator)
    quiet.describes = False
    return quiet


def check_aggregator(aggregator: object, /) -> None:
    """Raises a TypeError unless it is an aggregator of ours."""
    if isinstance(aggregator, Aggregator):
        return
    if isinstance(aggregator, type):
        found = f"the class {aggregator.__name__}; call it"
    else:
        found = (
            f"{type(aggregator).__name__} of {type(aggregator).__module__}; wrap TorchJD's "
            "aggregators by gradagree_opt.adapters.torchjd.from_torchjd"
        )
    raise TypeError(f"expected an aggregator as gradagree_opt.GradientAgreement(), found {found}")
