"""TorchJD's aggregators as ours: to ablate against, in every engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from gradagree_opt.core import weightings
from gradagree_opt.core.aggregation import Aggregator as OurAggregator
from gradagree_opt.core.agreement import GradientAgreement
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.matching import check_made
from gradagree_opt.core.results import Aggregation, Combine, Measured
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.frameworks import require

require("torchjd")

from torchjd.aggregation import (  # noqa: E402 - after require, whose error names the command
    Aggregator,
    Constant,
    FairGradWeighting,
    GramianWeightedAggregator,
    Mean,
    NashMTL,
    PCDWeighting,
    Random,
    Sum,
)
from torchjd.linalg import Matrix  # noqa: E402

OF_GRAMIAN = (Constant, Mean, NashMTL, Random, Sum)
"""Aggregators whose weights TorchJD takes from the matrix, where its Gramian is enough."""
OF_UNITS = (FairGradWeighting, NashMTL, PCDWeighting)
"""Those whose weights change when all signals are multiplied by one number."""


def from_torchjd(
    aggregator: Aggregator,
    /,
    *,
    scale_free: bool | None = None,
    match_norm: Literal["mean", "agreement"] | OurAggregator | None = None,
    nonfinite: Literal["raise", "drop", "propagate"] = "raise",
) -> OurAggregator:
    """A TorchJD aggregator as one of ours: to ablate against, in every engine.

    Where its weights come from the Gramian, that of the *signal* is what it is given, and its
    weights combine the directions. Any other (ConFIG, ExcessMTL, GradDrop, TrimmedMean) sees the
    directions alone, as a matrix: in MAML this takes the gradient of every task, and the result has
    NaN for weights.

    TorchJD solves on the host: not under vmap or ``torch.compile``. Its randomness is that of
    PyTorch's global generator, and what some keep from batch to batch is in ``aggregator``, whose
    ``reset()`` clears it.

    Args:
        aggregator: as ``torchjd.aggregation.UPGrad()``.
        scale_free: give it the Gramian in units of the task with the largest norm, so that its
            ``norm_eps`` and the like mean the same for small signals as for large ones. None:
            True, but for FairGrad, NashMTL and PCD, whose weights are defined by the units.
        match_norm: rescale the update to the norm of the "mean" update, of "agreement"'s, or of an
            aggregator of ours.
        nonfinite: as in :class:`gradagree_opt.GradientAgreement`.

    Raises:
        TypeError: ``aggregator`` is no TorchJD aggregator.
        ValueError: ``match_norm`` or ``scale_free`` is given for one that needs the matrix.

    >>> import gradagree_opt as ga
    >>> from gradagree_opt.adapters.torchjd import from_torchjd
    >>> from torchjd.aggregation import MGDA
    >>> gradients = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> from_torchjd(MGDA()).aggregate(gradients).weights
    tensor([0.2000, 0.8000])
    """
    check_made(aggregator, "a TorchJD aggregator as UPGrad()")
    if not isinstance(aggregator, Aggregator):
        raise TypeError(
            f"expected a TorchJD aggregator as UPGrad(), found {type(aggregator).__name__} of "
            f"{type(aggregator).__module__}; wrap a weighting as "
            "GramianWeightedAggregator(weighting), and take an aggregator of this library as it is"
        )
    if isinstance(aggregator, GramianWeightedAggregator):
        weigh: Callable[[Tensor], Tensor] = aggregator.gramian_weighting
    elif isinstance(aggregator, OF_GRAMIAN):
        weigh = aggregator.weighting << cast(Callable[[Tensor], Matrix], _root)
    else:
        if match_norm is not None or scale_free is not None:
            raise ValueError(
                f"expected neither match_norm nor scale_free for {type(aggregator).__name__}, "
                "found one of them; it gives no weights from a Gramian"
            )
        return OfMatrix(aggregator, nonfinite=nonfinite)
    if scale_free is None:
        scale_free = not any(isinstance(module, OF_UNITS) for module in aggregator.modules())
    if match_norm == "agreement":
        match_norm = GradientAgreement()
    return OurAggregator(OfGramian(weigh, scale_free), match_norm=match_norm, nonfinite=nonfinite)


@dataclass(frozen=True)
class OfGramian:
    """Our weighting made of TorchJD's function from a Gramian to weights."""

    needs: ClassVar[frozenset[weightings.Need]] = frozenset({"gramian"})
    draws_itself: ClassVar[bool] = True
    weigh: Callable[[Tensor], Tensor]
    scale_free: bool

    def __call__(self, statistics: Statistics, /) -> weightings.Decision:
        assert statistics.gramian is not None
        active = statistics.active.nonzero().flatten()
        weights = torch.zeros_like(statistics.row_sums)
        unsolved = False
        if len(active):
            gramian = statistics.gramian[active][:, active]
            if self.scale_free:
                gramian = gramian / or_one(gramian.diagonal().amax())
            else:
                gramian = gramian * statistics.scale * statistics.scale
            if not gramian.isfinite().all():  # TorchJD's solvers would stop at it
                weights[active] = torch.nan
            else:
                try:
                    weights[active] = _answer(self.weigh, gramian).to(weights)
                except ValueError:  # of zeros NashMTL makes NaN, which its solver refuses
                    unsolved = not gramian.any()
                    if not unsolved:
                        raise
        decision = weightings.plain_decision(weights, statistics)
        return decision._replace(degenerate=torch.full_like(decision.degenerate, unsolved))


@dataclass(frozen=True)
class Unknown:
    """Weights of NaN, for an update that is no weighted sum of the directions."""

    needs: ClassVar[frozenset[weightings.Need]] = frozenset({"directions"})

    def __call__(self, statistics: Statistics, /) -> weightings.Decision:
        unknown = torch.full_like(statistics.row_sums, torch.nan)
        return weightings.plain_decision(unknown, statistics)


class OfMatrix(OurAggregator):
    """Our aggregator made of a TorchJD aggregator that needs the directions themselves."""

    def __init__(
        self, aggregator: Aggregator, /, *, nonfinite: Literal["raise", "drop", "propagate"]
    ) -> None:
        super().__init__(Unknown(), nonfinite=nonfinite)
        self.torchjd = aggregator

    def __repr__(self) -> str:
        return f"from_torchjd({self.torchjd!r}, nonfinite={self.nonfinite!r})"

    def apply(self, measured: Measured, combine_directions: Combine, /) -> Aggregation:
        statistics = measured.statistics
        like = statistics.row_sums
        tasks = torch.eye(len(statistics.active), dtype=like.dtype, device=like.device)
        # The direction of a task is the combination in which it alone has weight.
        directions = [combine_directions(task, None) for task in tasks[statistics.active]]
        if directions:
            update = self._aggregated(directions)
        else:
            update = combine_directions(0 * tasks[0], None)
        result = super().apply(measured, lambda *_: update)
        unknown = result.diagnostics.weight_sum
        diagnostics = result.diagnostics._replace(negative_share=unknown)
        return result._replace(diagnostics=diagnostics)

    def _aggregated(self, directions: list[PyTree]) -> PyTree:
        """TorchJD's vector of the directions, in their structure."""
        matrix = torch.stack(
            [torch.cat([leaf.flatten() for leaf in tree_leaves(tree)]) for tree in directions]
        )
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        if matrix.isfinite().all():
            vector = _answer(self.torchjd, matrix)
        else:
            vector = torch.full_like(matrix[0], torch.nan)  # TorchJD's solvers would stop at it
        leaves = tree_leaves(directions[0])
        parts = vector.split_with_sizes([leaf.numel() for leaf in leaves])
        shaped = [p.reshape(leaf.shape).to(leaf) for p, leaf in zip(parts, leaves, strict=True)]
        return tree_unflatten(shaped, tree_structure(directions[0]))


def _answer(ask: Callable[[Tensor], Tensor], tasks: Tensor) -> Tensor:
    """What TorchJD answers, or a ValueError of one sentence: cvxpy's names no task."""
    try:
        return ask(tasks)
    except ValueError as error:
        raise ValueError(
            f"expected tasks that TorchJD's aggregator can weigh, found {len(tasks)} of which it "
            f"says {str(error).rstrip('.')!r}; give it the number of tasks that it is made for"
        ) from error


def _root(gramian: Tensor) -> Tensor:
    """A matrix [n, n] with this Gramian, whose rows stand to each other as the signals do."""
    values, vectors = torch.linalg.eigh(gramian.double())
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root.to(gramian.dtype)
