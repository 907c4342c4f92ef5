"""Aggregator: task-stacked directions in, their weighted sum out."""

import inspect
from functools import partial

from torch import Tensor

from gradagree_opt.annotations import Bool
from gradagree_opt.core.combination import Combination
from gradagree_opt.core.diagnostics import complaint
from gradagree_opt.core.matching import check_made
from gradagree_opt.core.pipeline import Pipeline
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.scopes import check_signal
from gradagree_opt.core.stacks import PyTree, check_stack, mask_rows, nonfinite_tasks
from gradagree_opt.core.weightings import draws_itself


class Aggregator(Pipeline):
    """A weighting, and how its weights are applied.

    Args:
        weighting: maps statistics to weights; a function will do if it reads row sums alone.
        scope: "global", one weight a task; "leaf", one for each parameter tensor; or a callable
            from the path of a leaf to the name of its group.
        match_norm: None, "mean" or an aggregator of the same scope: rescale the update to the norm
            of that method's.
        nonfinite: "raise" names the tasks with NaN or inf, "drop" gives them weight 0,
            "propagate" looks at nothing (no host synchronisation).
        generator: source of randomness of a weighting that draws.

    Raises:
        TypeError, ValueError: the weighting is not one or needs what does not exist, or an option
            has a value that it does not take.
    """

    def __repr__(self) -> str:
        """The constructor's arguments, without defaults and without those that are not kept."""
        owners = (self, getattr(self, "weighting", None))
        options, complete = [], True
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = _kept(name, owners)
            required = parameter.default is parameter.empty
            complete = complete and not (required and value is _NOWHERE)
            if value is _NOWHERE or not (required or _differs(value, parameter.default)):
                continue
            by_place = required and complete and parameter.kind is not parameter.KEYWORD_ONLY
            options.append(repr(value) if by_place else f"{name}={value!r}")
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

        >>> import torch
        >>> import gradagree_opt as ga
        >>> grads = {"w": torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])}
        >>> result = ga.GradientAgreement().aggregate(grads)
        >>> result.weights
        tensor([ 0.3333,  0.3333, -0.3333])
        >>> result.update
        {'w': tensor([1., 0.])}
        """
        check_aggregator(self)
        with self.step_of_ranks():
            aggregator = self.for_batch(self._check(directions, signal))
            # Sums without scaling are faster, and the check that is due anyway shows whether they
            # are sound. A weighting that reads the Gram matrix itself may depend on the scale.
            once = self.ranks is not None or draws_itself(self.weightings)
            if self.nonfinite == "raise" and not (once or self.needs & {"gramian", "directions"}):
                result = aggregator._aggregate(directions, signal, scaled=False)
                if self._complaint(result) is None:
                    return result
            result = aggregator._aggregate(directions, signal)
            self.verify(result)
            return result

    def aggregate_unchecked(
        self,
        directions: PyTree,
        signal: PyTree | None = None,
        *,
        nonfinite: Bool[Tensor, " n"] | None = None,
    ) -> Aggregation:
        """:meth:`aggregate` without the check of its result: runs under vmap and torch.compile.

        Args:
            directions: task-stacked pytree.
            signal: task-stacked pytree, or None.
            nonfinite: tasks known to be non-finite by other means, as by their losses.
        """
        self._check(directions, signal)
        return self._aggregate(directions, signal, nonfinite=nonfinite)

    def _check(self, directions: PyTree, signal: PyTree | None) -> int:
        """The number of tasks."""
        name = "directions" if signal is not None else "gradients"
        n = check_stack(directions, name, least=self.fewest)
        if signal is not None:
            check_signal(signal, directions, n, self.scope)
        return n

    def _aggregate(
        self,
        directions: PyTree,
        signal: PyTree | None,
        *,
        nonfinite: Bool[Tensor, " n"] | None = None,
        scaled: bool = True,
    ) -> Aggregation:
        aggregate = partial(self._of_parts, nonfinite=nonfinite, scaled=scaled)
        if self.ranks is None:
            return aggregate(directions, signal)
        return self.ranks.by_parts(directions, signal, aggregate)

    def _of_parts(
        self,
        directions: PyTree,
        signal: PyTree | None,
        *,
        nonfinite: Bool[Tensor, " n"] | None,
        scaled: bool,
    ) -> Aggregation:
        if signal is not None or self.nonfinite == "drop":
            found = nonfinite_tasks(directions, signal)
            nonfinite = found if nonfinite is None else nonfinite | found
        if nonfinite is not None and self.nonfinite == "drop":
            directions = mask_rows(directions, ~nonfinite)
            signal = None if signal is None else mask_rows(signal, ~nonfinite)
        measured = self.measure(
            directions if signal is None else signal,
            directions=None if signal is None else directions,
            nonfinite=nonfinite,
            scaled=scaled,
        )
        return self.apply(measured, Combination(directions))

    def verify(self, result: Aggregation, /) -> None:
        """One host synchronisation: raises where the policies for bad tasks say so.

        Raises:
            ValueError: a task or the update is non-finite under nonfinite="raise", or the scores
                cancel under degenerate="raise".
        """
        found = self._complaint(result)
        if found is not None:
            raise ValueError(found)

    def _complaint(self, result: Aggregation) -> str | None:
        return complaint(
            result.diagnostics,
            finite=self.nonfinite == "raise",
            agreement=getattr(self.weighting, "degenerate", None) == "raise",
            name=str if self.ranks is None else self.ranks.name,
        )


_NOWHERE = object()


def _kept(name: str, owners: tuple[object, ...]) -> object:
    """The option of that name, from the first owner that has it; a method is no option."""
    for owner in owners:
        value = getattr(owner, name, _NOWHERE)
        if value is not _NOWHERE and getattr(value, "__self__", None) is not owner:
            return value
    return _NOWHERE


def _differs(value: object, default: object) -> bool:
    """Whether it is not the default; arrays, which compare entry by entry, count as different."""
    try:
        return value is not default and bool(value != default)
    except Exception:  # whatever the class of a user's option raises
        return True


def check_aggregator(aggregator: object, /) -> None:
    """Raises a TypeError unless it is an instance of :class:`Aggregator`, with a weighting."""
    expected = "an aggregator as gradagree_opt.GradientAgreement()"
    check_made(aggregator, expected)
    if not isinstance(aggregator, Aggregator):
        raise TypeError(
            f"expected {expected}, found {type(aggregator).__name__} of "
            f"{type(aggregator).__module__}; wrap a weighting of your own by "
            "gradagree_opt.Aggregator, and TorchJD's aggregators by "
            "gradagree_opt.adapters.torchjd.from_torchjd"
        )
