"""match_norm: the update of one method at the length of another's."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.annotations import Float
from gradagree_opt.core.diagnostics import update_rounding
from gradagree_opt.core.results import Decided, Measured
from gradagree_opt.core.scopes import Scope
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.core.weightings import UniformWeighting, Weigh
from gradagree_opt.options import check_choice

AN_AGGREGATOR = "an aggregator as gradagree_opt.Sum()"
"""What match_norm takes besides words, for the messages."""


def check_made(aggregator: Any, expected: str, /) -> None:
    """Raises a TypeError where it is a class, or an aggregator that was never constructed."""
    if isinstance(aggregator, type):
        raise TypeError(f"expected {expected}, found the class {aggregator.__name__}; call it")
    if hasattr(aggregator, "aggregate_unchecked") and not hasattr(aggregator, "weighting"):
        raise TypeError(
            f"expected {type(aggregator).__name__}.__init__ to call super().__init__(…), found no "
            "weighting; give it one there"
        )


def reference_of(method: Any, scope: Scope, /) -> Weigh | None:
    """The weighting whose update has the length that is matched; None where none is.

    Args:
        method: None, "mean" or an aggregator.
        scope: of the aggregator that is given it.

    Raises:
        TypeError: it is an aggregator that was never constructed.
        ValueError: it is none of these, or an aggregator whose weights do not tell a length here.
    """
    check_made(method, f"match_norm with {AN_AGGREGATOR}")
    if not hasattr(method, "weighting"):
        check_choice("match_norm", method, (None, "mean"), AN_AGGREGATOR)
        return None if method is None else UniformWeighting()
    if method.reference is not None or "directions" in method.needs:
        raise ValueError(
            "expected match_norm with an aggregator whose weights give its length, found "
            f"{method}; give it without match_norm, and none of TorchJD's that takes the matrix"
        )
    if getattr(method.weighting, "degenerate", None) == "raise":
        raise ValueError(
            "expected match_norm with an aggregator that has a length for every batch, found "
            f"{method}; give it degenerate='uniform' or 'zero'"
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
    weighting: Weigh = method.weighting
    return weighting


def factor_to(
    length: Float[Tensor, ""], norm: Float[Tensor, ""], decided: Decided, measured: Measured, /
) -> Float[Tensor, ""]:
    """The factor from this norm of an update to this length; 1 if the update is rounding alone."""
    rounding: Tensor | int = 0
    if measured.signal_is_direction:
        rounding = update_rounding(measured.statistics, decided.decision)
    return torch.where(norm > rounding, length / norm, torch.ones_like(norm))


def rescaled(
    update: PyTree, norm: Float[Tensor, ""], decided: Decided, factor: Float[Tensor, ""], /
) -> tuple[PyTree, Float[Tensor, ""], Decided]:
    """Update, norm and weights times a factor."""
    update = tree_map(lambda leaf: (leaf * factor).to(leaf.dtype), update)
    weights = decided.decision.weights * factor
    decision = decided.decision._replace(weights=weights)
    return update, norm * factor, decided._replace(decision=decision)
