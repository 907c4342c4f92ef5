"""TorchJD, both ways: our methods as its aggregators, and any of its own as ours."""

from typing import Literal

from torch import Tensor

from gradagree_opt.core import agreement, equal, weightings
from gradagree_opt.core.statistics import from_gramian
from gradagree_opt.frameworks import require

require("torchjd")

from gradagree_opt.adapters.torchjd_wrapped import from_torchjd  # noqa: E402
from torchjd.aggregation import (  # noqa: E402 - after require, whose error names the command
    GramianWeightedAggregator,
    Weighting,
)
from torchjd.linalg import PSDMatrix  # noqa: E402

__all__ = [
    "AgreementWeighting",
    "EqualAgreement",
    "EqualAgreementWeighting",
    "GradientAgreement",
    "from_torchjd",
]


class AgreementWeighting(Weighting[PSDMatrix]):
    """Gradient Agreement as a TorchJD weighting: from a Gramian ``[n, n]`` to n weights.

    The weights are constants of differentiation. A Gramian squares the scale: in float32 it holds
    signals whose entries lie between some 1e-19 and 1e19.

    Args:
        similarity, include_self, negative, normalization, temperature, degenerate: as in
            :class:`gradagree_opt.GradientAgreement`.

    Raises:
        ValueError: an option has none of its values; when called, the Gramian is not square, or
            the scores cancel under degenerate="raise".

    Source: Eshratifar et al. 2018 (arXiv:1810.08178), algorithm 1, steps 3 and 4.

    >>> import torch
    >>> jacobian = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    >>> AgreementWeighting()(jacobian @ jacobian.T)
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
        degenerate: Literal["uniform", "zero", "raise"] = "uniform",
    ) -> None:
        super().__init__()
        self.decide = agreement.AgreementWeighting(
            similarity=similarity,
            include_self=include_self,
            negative=negative,
            normalization=normalization,
            temperature=temperature,
            degenerate=degenerate,
        )

    def forward(self, gramian: Tensor, /) -> Tensor:
        """The weights ``[n]``, in the dtype of the Gramian."""
        decision = _decision(self.decide, gramian)
        if self.decide.degenerate == "raise" and decision.degenerate:
            raise ValueError(
                "expected tasks that agree or disagree, found scores that cancel to zero; "
                "give degenerate='uniform' or 'zero' for a fallback"
            )
        return decision.weights.to(gramian.dtype)

    def extra_repr(self) -> str:
        return repr(self.decide)


class GradientAgreement(GramianWeightedAggregator):
    """Gradient Agreement as a TorchJD aggregator, for ``jac_to_grad`` after ``autojac.backward``.

    Args:
        similarity, include_self, negative, normalization, temperature, degenerate: as in
            :class:`gradagree_opt.GradientAgreement`.

    Raises:
        ValueError: as :class:`AgreementWeighting`.

    Source: Eshratifar et al. 2018 (arXiv:1810.08178), algorithm 1.

    >>> import torch
    >>> from torchjd.autojac import backward, jac_to_grad
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([2 * w[0], w.sum(), -w[1]])
    >>> jac_to_grad([w], GradientAgreement())
    tensor([0.6667, 0.3333, 0.0000])
    >>> w.grad
    tensor([1.6667, 0.3333])
    """

    def __init__(
        self,
        *,
        similarity: Literal["inner", "cosine"] = "inner",
        include_self: bool = True,
        negative: Literal["keep", "clip"] = "keep",
        normalization: Literal["l1", "softmax"] = "l1",
        temperature: float = 1.0,
        degenerate: Literal["uniform", "zero", "raise"] = "uniform",
    ) -> None:
        super().__init__(
            AgreementWeighting(
                similarity=similarity,
                include_self=include_self,
                negative=negative,
                normalization=normalization,
                temperature=temperature,
                degenerate=degenerate,
            )
        )


class EqualAgreementWeighting(Weighting[PSDMatrix]):
    """Equal Agreement as a TorchJD weighting: from a Gramian ``[n, n]`` to n weights.

    The weights are constants of differentiation. A Gramian squares the scale: in float32 it holds
    signals whose entries lie between some 1e-19 and 1e19.

    Args:
        damping, similarity: as in :class:`gradagree_opt.EqualAgreement`.

    Raises:
        ValueError: an option has none of its values; when called, the Gramian is not square.

    Source: as :class:`gradagree_opt.EqualAgreement`.

    >>> import torch
    >>> jacobian = torch.tensor([[4.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    >>> EqualAgreementWeighting()(jacobian @ jacobian.T)
    tensor([0.4903, 0.4975, 0.9951])
    """

    def __init__(
        self, *, damping: float = 0.01, similarity: Literal["inner", "cosine"] = "cosine"
    ) -> None:
        super().__init__()
        self.decide = equal.EqualWeighting(damping=damping, similarity=similarity)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """The weights ``[n]``, in the dtype of the Gramian."""
        return _decision(self.decide, gramian).weights.to(gramian.dtype)

    def extra_repr(self) -> str:
        return repr(self.decide)


class EqualAgreement(GramianWeightedAggregator):
    """Equal Agreement as a TorchJD aggregator, for ``jac_to_grad`` after ``autojac.backward``.

    Args:
        damping, similarity: as in :class:`gradagree_opt.EqualAgreement`.

    Raises:
        ValueError: as :class:`EqualAgreementWeighting`.

    Source: as :class:`gradagree_opt.EqualAgreement`.

    >>> import torch
    >>> from torchjd.autojac import backward, jac_to_grad
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([4 * w[0], 2 * w[1], w[1]])
    >>> jac_to_grad([w], EqualAgreement())
    tensor([0.4903, 0.4975, 0.9951])
    >>> w.grad
    tensor([1.9612, 1.9901])
    """

    def __init__(
        self, *, damping: float = 0.01, similarity: Literal["inner", "cosine"] = "cosine"
    ) -> None:
        super().__init__(EqualAgreementWeighting(damping=damping, similarity=similarity))


def _decision(weighting: weightings.Weighting, gramian: Tensor) -> weightings.Decision:
    """What a weighting of ours decides, from the Gramian alone."""
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
        raise ValueError(
            f"expected a Gramian [n, n] of at least one task, found shape "
            f"{list(gramian.shape)}; give jacobian @ jacobian.T"
        )
    if not gramian.is_floating_point():
        raise TypeError(
            f"expected a floating-point Gramian, found {gramian.dtype}; give gramian.float()"
        )
    return weightings.decide(weighting, from_gramian(gramian))
