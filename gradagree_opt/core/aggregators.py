"""The aggregators by name: Gradient Agreement and the methods it is compared with."""

from typing import Literal

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.scopes import Scope
from gradagree_opt.core.stacks import PyTree, check_stack
from gradagree_opt.core.weightings import (
    AN_AGGREGATOR,
    AgreementWeighting,
    ConstantWeighting,
    NormShareWeighting,
    RandomWeighting,
    check_choice,
)

Nonfinite = Literal["raise", "drop", "propagate"]


class GradientAgreement(Aggregator):
    """Weights each task by how well its signal agrees with the others: w_i = s_i / Σ_k |s_k|.

    The defaults are the paper's method; every option is one axis of an ablation. The weights are
    constants of differentiation, and Σ|w_i| = 1, so that the update is a weighted *sum* which
    already carries the 1/n.

    Args:
        similarity: "inner", s_i = Σ_j g_i · g_j (paper); "cosine": every g_i has unit norm first,
            so a large task has no more say than a small one.
        include_self: False leaves the j = i term out of the sum.
        negative: "keep" (paper): a task that disagrees is ascended; "clip": its score becomes 0.
        normalization: "l1" (paper); "softmax" of the scores in units of their mean absolute value.
        temperature: of the softmax.
        scope: "global", one weight a task over all parameters (paper); "leaf", one for each
            parameter tensor; or a callable from a leaf's path to the name of its group.
        match_norm: None (paper); "mean" or an aggregator of the same scope: rescale the update to
            the norm of that one's.
        degenerate: where the scores cancel up to rounding (all g_i zero, or Σ g_i = 0): "uniform"
            weights, "zero" weights, or "raise".
        nonfinite: tasks with NaN or inf: "raise" names them, "drop" gives them weight 0,
            "propagate" looks at nothing: for GradScaler, vmap and torch.compile.

    Raises:
        ValueError: an option has none of these values.

    Source: Eshratifar, Eigen, Pedram 2018 (arXiv:1810.08178), algorithm 1. The paper is silent on
    include_self=False, scope, degenerate and nonfinite; the other options are ours.

    >>> import gradagree_opt as ga
    >>> grads = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    >>> ga.GradientAgreement()(grads)
    tensor([1.6667, 0.3333])
    >>> ga.GradientAgreement(negative="clip").aggregate(grads).weights
    tensor([0.6667, 0.3333, 0.0000])
    """

    def __init__(
        self,
        *,
        similarity: Literal["inner", "cosine"] = "inner",
        include_self: bool = True,
        negative: Literal["keep", "clip"] = "keep",
        normalization: Literal["l1", "softmax"] = "l1",
        temperature: float = 1.0,
        scope: Scope = "global",
        match_norm: Literal["mean"] | Aggregator | None = None,
        degenerate: Literal["uniform", "zero", "raise"] = "uniform",
        nonfinite: Nonfinite = "raise",
    ) -> None:
        if not isinstance(match_norm, Aggregator):
            check_choice("match_norm", match_norm, (None, "mean"), AN_AGGREGATOR)
        weighting = AgreementWeighting(
            similarity=similarity,
            include_self=include_self,
            negative=negative,
            normalization=normalization,
            temperature=temperature,
            degenerate=degenerate,
        )
        super().__init__(weighting, scope=scope, match_norm=match_norm, nonfinite=nonfinite)


class Mean(Aggregator):
    """The plain average over tasks: what Gradient Agreement is swapped in for.

    Args:
        match_norm: an aggregator, whose update's length the mean's direction gets: the control that
            tells a method from the size of its steps. "agreement" is Gradient Agreement, whose step
            is never shorter than the mean's. The norm is that over all parameters.
        nonfinite: as in :class:`GradientAgreement`.

    Raises:
        ValueError: match_norm is of another kind, has a match_norm of its own, or is one of
            TorchJD's that give no weights.

    >>> import gradagree_opt as ga
    >>> ga.Mean()(torch.tensor([[2.0], [4.0]]))
    tensor([3.])
    >>> ga.Mean(match_norm=ga.Sum())(torch.tensor([[2.0], [4.0]]))
    tensor([6.])
    """

    def __init__(
        self,
        *,
        match_norm: Literal["agreement"] | Aggregator | None = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        scope: Scope = "global"
        if isinstance(match_norm, Aggregator):
            scope = match_norm.scope
        else:
            check_choice("match_norm", match_norm, (None, "agreement"), AN_AGGREGATOR)
        super().__init__(
            ConstantWeighting("mean"), scope=scope, match_norm=match_norm, nonfinite=nonfinite
        )


class Sum(Aggregator):
    """The sum over tasks; its outer rate is n times smaller than the mean's.

    >>> import gradagree_opt as ga
    >>> ga.Sum()(torch.tensor([[2.0], [4.0]]))
    tensor([6.])
    """

    def __init__(self, *, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(ConstantWeighting("sum"), nonfinite=nonfinite)


class NormShare(Aggregator):
    """Control: w_i = ‖g_i‖² / Σ_j ‖g_j‖², Gradient Agreement's limit for orthogonal tasks.

    >>> import gradagree_opt as ga
    >>> ga.NormShare().aggregate(torch.tensor([[1.0], [3.0]])).weights
    tensor([0.1000, 0.9000])
    """

    def __init__(self, *, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(NormShareWeighting(), nonfinite=nonfinite)


class RandomWeights(Aggregator):
    """Control: positive random weights of sum 1, drawn anew for every batch.

    The weights are uniform on the simplex (exponential draws over their sum).

    Args:
        generator: source of the draws.

    >>> import gradagree_opt as ga
    >>> random = ga.RandomWeights(torch.Generator().manual_seed(0))
    >>> float(random.aggregate(torch.ones(4, 2)).weights.sum().round(decimals=6))
    1.0
    """

    def __init__(self, generator: torch.Generator, /, *, nonfinite: Nonfinite = "raise") -> None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"expected a torch.Generator, found {type(generator).__name__}; "
                "pass torch.Generator().manual_seed(seed)"
            )
        super().__init__(RandomWeighting(), nonfinite=nonfinite, generator=generator)


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


def agreement_weights(
    signal: PyTree,
    /,
    *,
    similarity: Literal["inner", "cosine"] = "inner",
    include_self: bool = True,
    negative: Literal["keep", "clip"] = "keep",
    normalization: Literal["l1", "softmax"] = "l1",
    temperature: float = 1.0,
    scope: Scope = "global",
    degenerate: Literal["uniform", "zero", "raise"] = "uniform",
    nonfinite: Nonfinite = "raise",
) -> Float[Tensor, "*groups n"]:
    """Gradient Agreement's weights ``[n]`` alone, without an update.

    Args:
        signal: task-stacked pytree, every leaf ``[n, *shape]``.
        similarity, include_self, negative, normalization, temperature, scope, degenerate,
            nonfinite: as in :class:`GradientAgreement`.

    Raises:
        ValueError, TypeError: as :meth:`gradagree_opt.Aggregator.aggregate`.

    >>> agreement_weights(torch.tensor([[1.0], [1.0], [-1.0]]))
    tensor([ 0.3333,  0.3333, -0.3333])
    """
    check_stack(signal, "signal")
    return (
        GradientAgreement(
            similarity=similarity,
            include_self=include_self,
            negative=negative,
            normalization=normalization,
            temperature=temperature,
            scope=scope,
            degenerate=degenerate,
            nonfinite=nonfinite,
        )
        .aggregate(signal)
        .weights
    )
