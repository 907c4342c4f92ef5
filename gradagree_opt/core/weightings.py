"""Decide: pure functions from the statistics of n tasks to n weights.

A weighting works on the last axis, so the same code weights all parameters at once or one group
of them at a time. Its fields are its options; it holds no state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.statistics import Statistics


class Decision(NamedTuple):
    """Weights of n tasks, the scores they come from, and where the scores say nothing."""

    weights: Float[Tensor, "*groups n"]
    scores: Float[Tensor, "*groups n"]
    degenerate: Bool[Tensor, "*groups"]


Need = Literal[
    "squared_norms",
    "relative_norms",
    "other_row_sums",
    "cosine_row_sums",
    "cosines",
    "gramian",
    "draws",
    "directions",
]
"""What a weighting may ask for beside the row sums, each a field of :class:`Statistics`.

With "cosine_row_sums" comes "nonzero", with "cosines" also "relative_norms". "directions" is no
statistic: no weights tell the update, so the aggregator reads the directions one by one.
"""


@runtime_checkable
class Weighting(Protocol):
    """From the statistics of n tasks to their weights: what an aggregator asks of a weighting.

    A function will do if it reads the row sums alone. The answer may also be the weights ``[n]``
    themselves, as numbers or as a choice of tasks. A weighting works on the last axis, so that it
    serves every scope. It may have three attributes:

    - ``reads_signal = False``: the weights do not depend on the signals. Where that saves a pass,
      nothing is measured, and the row sums are NaN.
    - ``measures_directions = True``: the weights are made for the vectors that they combine, as
      Equal Agreement's are. MAML then measures meta-gradients, and not displacements.
    - ``draws_itself = True``: the weighting draws random numbers by itself, or remembers what it
      has seen. It is then asked once for every batch, and on several ranks the first one's answer
      counts for all.

    >>> import torch
    >>> import gradagree_opt as ga
    >>> def sign(statistics: ga.Statistics) -> torch.Tensor:
    ...     return statistics.row_sums.sign() / statistics.active.sum()
    >>> ga.Aggregator(sign).aggregate(torch.tensor([[3.0], [1.0], [-1.0]])).weights
    tensor([ 0.3333,  0.3333, -0.3333])
    """

    @property
    def needs(self) -> frozenset[Need]:
        """Names of the optional statistics that it reads."""

    def __call__(self, statistics: Statistics, /) -> Decision | Tensor:
        """The weights of the tasks."""


Weigh = Weighting | Callable[[Statistics], Decision | Tensor]
"""What an aggregator takes as its weighting."""


def needs_of(weighting: object, /) -> frozenset[Need]:
    """What a weighting needs; a plain function, nothing but the row sums."""
    return getattr(weighting, "needs", frozenset())


def draws_itself(weightings: Sequence[object], /) -> bool:
    """Whether one of them draws by itself or remembers, and is to be asked once for a batch."""
    return any(getattr(weighting, "draws_itself", False) for weighting in weightings)


def check_weighting(weighting: object, /) -> None:
    """Raises a TypeError or ValueError unless it is a weighting, with needs that exist."""
    if isinstance(weighting, type) or not callable(weighting):
        found = repr(weighting)
        if isinstance(weighting, type):
            found = f"the class {weighting.__name__}; call it"
        raise TypeError(
            "expected a weighting as a function from gradagree_opt.Statistics to n weights, found "
            f"{found}"
        )
    owner = type(weighting).__module__
    if hasattr(weighting, "aggregate_unchecked") or owner.startswith("torchjd."):
        raise TypeError(
            "expected a weighting as a function from gradagree_opt.Statistics to n weights, found "
            f"{type(weighting).__name__} of {owner}; take an aggregator of this library as it is, "
            "and TorchJD's by gradagree_opt.adapters.torchjd.from_torchjd"
        )
    unknown = set(getattr(weighting, "needs", ())).difference(get_args(Need))
    if unknown:
        raise ValueError(
            f"expected needs of {type(weighting).__name__} among {', '.join(get_args(Need))}; "
            f"found {', '.join(sorted(map(repr, unknown)))}"
        )


def decide(weighting: Weigh, statistics: Statistics, /) -> Decision:
    """What a weighting decides, checked: a weight for every task.

    Raises:
        TypeError, ValueError: it returns anything else.
    """
    decision: object = weighting(statistics)
    if isinstance(decision, Tensor):
        decision = plain_decision(decision, statistics)
    if not isinstance(decision, Decision):
        raise TypeError(
            "expected weights or a gradagree_opt.Decision from the weighting, found "
            f"{type(decision).__name__}; return one weight a task"
        )
    each, groups = statistics.row_sums.shape, statistics.scale.shape
    for name, value, shape in zip(Decision._fields, decision, (each, each, groups), strict=True):
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if found != list(shape):
            raise ValueError(
                f"expected {name} of shape {list(shape)} from the weighting, found {found}; work "
                "on the last axis of the statistics, that of the tasks"
            )
    if decision.weights.is_complex():
        raise TypeError(
            f"expected real weights from the weighting, found {decision.weights.dtype}; return "
            "their abs() or their real part"
        )
    if not decision.weights.is_floating_point():  # a choice of tasks, as row_sums > 0
        decision = decision._replace(weights=decision.weights.to(statistics.row_sums))
    return decision


@dataclass(frozen=True)
class UniformWeighting:
    """The same weight for every task: 1/n for the mean, 1 for the sum."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    reads_signal: ClassVar[bool] = False
    total: Literal["mean", "sum"] = "mean"

    def __call__(self, statistics: Statistics, /) -> Decision:
        weights = uniform(statistics)
        if self.total == "sum":
            weights = (weights > 0).to(weights.dtype)
        return plain_decision(weights, statistics)


def uniform(statistics: Statistics, /) -> Float[Tensor, "*groups n"]:
    """1/n for every active task, 0 for the others."""
    active = statistics.active.to(statistics.row_sums.dtype)
    return (active / active.sum().clamp(min=1)).expand_as(statistics.row_sums)


def in_squared_units(values: Tensor, statistics: Statistics, /) -> Tensor:
    """Brings values from units of scale² to those of the signals; scale² itself may overflow."""
    scale = statistics.scale.unsqueeze(-1)
    return values * scale * scale


def plain_decision(weights: Tensor, statistics: Statistics) -> Decision:
    """Weights that do not come from scores, beside the agreement scores of the same tasks."""
    scores = in_squared_units(statistics.row_sums, statistics)
    return Decision(weights, scores, torch.zeros_like(statistics.scale, dtype=torch.bool))
