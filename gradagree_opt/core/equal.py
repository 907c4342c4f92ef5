"""Equal Agreement: the update on which all tasks agree alike; and the powers of the Gram matrix.

With J the stack of n signals and G = J Jᵀ, the weights Gᵏ 1 are those of the mean for k = 0, those
of Gradient Agreement up to its length for k = 1 and, damped, those of Equal Agreement for k = −1.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.pipeline import Nonfinite
from gradagree_opt.core.positive_definite import power, solve
from gradagree_opt.core.scopes import Scope
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.weightings import Decision, Need, uniform
from gradagree_opt.options import check_choice, check_positive, is_finite_number


@dataclass(frozen=True)
class EqualWeighting:
    """w = (1 + λ) (Ĝ/n + λ I)⁻¹ 1/n · τ / ‖g_i‖, Ĝ the cosines and τ the median norm.

    With similarity "inner" w = (1 + λ) (G/(n τ²) + λ I)⁻¹ 1/n. The options are those of
    :class:`EqualAgreement`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"cosines"})
    measures_directions: ClassVar[bool] = True
    damping: float = 0.01
    similarity: Literal["inner", "cosine"] = "cosine"

    def __post_init__(self) -> None:
        check_positive("damping", self.damping)
        check_choice("similarity", self.similarity, ("inner", "cosine"))

    def __call__(self, statistics: Statistics, /) -> Decision:
        tasks = _tasks(statistics)
        identity = _identity(tasks.norms)
        damping = tasks.n * self.damping
        factor = 1 + self.damping
        if self.similarity == "cosine":
            matrix = torch.addcmul(tasks.cosines, identity, damping.unsqueeze(-1))
            scores = factor * solve(matrix, tasks.counted.to(matrix))
            return Decision(scores / tasks.norms, scores, tasks.none)
        # D Ĝ D + n λ I = E⁻¹ R E⁻¹ with the norms D and ones on the diagonal of R: no squares of
        # norms, which may overflow.
        root = damping.sqrt()
        scales = torch.hypot(tasks.norms, root).reciprocal()  # E
        shares = torch.hypot(root / tasks.norms, torch.ones_like(root)).reciprocal()  # E D
        matrix = tasks.cosines * shares.unsqueeze(-1) * shares.unsqueeze(-2)
        matrix = torch.where(identity == 1, identity, matrix)
        scores = factor * scales * solve(matrix, torch.where(tasks.counted, scales, 0))
        return Decision(scores, scores, tasks.none)


@dataclass(frozen=True)
class PowerWeighting:
    """w = Mᵏ 1/n, M = G / λ_max(G) for k > 0 and (G/(n τ²) + λ I) / (1 + λ) for k < 0.

    The options are those of :class:`GramianPower`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"cosines"})
    power: float | int
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not is_finite_number(self.power):
            raise ValueError(
                f"expected a finite number for power, found {self.power!r}; give an int or a "
                "float: 0 is the mean, 1 Gradient Agreement up to its length, -1 Equal Agreement"
            )
        check_positive("damping", self.damping)

    @property
    def measures_directions(self) -> bool:
        return self.power < 0

    def __call__(self, statistics: Statistics, /) -> Decision:
        if self.power == -1:  # by a solve, which norms that lie far apart do not make inaccurate
            return EqualWeighting(self.damping, "inner")(statistics)
        tasks = _tasks(statistics)
        if self.power == 0:
            weights = uniform(statistics)
        else:
            weights = power(self._matrix(tasks), tasks.counted / tasks.n, self.power)
            weights = torch.where(tasks.counted, weights, 0)
        return Decision(weights, weights, tasks.none)

    def _matrix(self, tasks: "_Tasks") -> Tensor:
        sizes = tasks.norms / tasks.n.sqrt()
        if self.power > 0:  # its unit is the largest eigenvalue
            sizes = sizes / sizes.amax(-1, keepdim=True)
        matrix = tasks.cosines * sizes.unsqueeze(-1) * sizes.unsqueeze(-2)
        if self.power > 0:
            return matrix
        return (matrix + self.damping * _identity(sizes)) / (1 + self.damping)


class _Tasks(NamedTuple):
    """The n tasks that are not zero; the others have cosines 0 and norm 1."""

    n: Float[Tensor, "*groups 1"]
    counted: Bool[Tensor, "*groups n"]
    none: Bool[Tensor, "*groups"]
    cosines: Float[Tensor, "*groups n n"]
    norms: Float[Tensor, "*groups n"]


def _tasks(statistics: Statistics) -> _Tasks:
    cosines, norms, counted = statistics.cosines, statistics.relative_norms, statistics.nonzero
    assert cosines is not None and norms is not None and counted is not None
    count = counted.sum(-1, keepdim=True, dtype=norms.dtype)
    none = (count == 0).squeeze(-1)
    # A norm that vanishes beside the median stays 0, and makes a weight infinite that would be so.
    return _Tasks(count.clamp(min=1), counted, none, cosines, norms.masked_fill(~counted, 1))


def _identity(like: Float[Tensor, "*groups n"]) -> Float[Tensor, "n n"]:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


class EqualAgreement(Aggregator):
    """The update on which all tasks agree alike: each u_i = g_i / ‖g_i‖ has u_i · d near one value.

    The weights are (1 + λ) [(Ĝ/n + λ I)⁻¹ 1/n]_i · τ / ‖g_i‖ with the cosines Ĝ_ij = u_i · u_j and
    the median norm τ. Their update solves min_d Σ_i (u_i · d − 1)² + n λ ‖d‖², up to a factor by
    which equal tasks give exactly the mean. How huge a single task among three or more is moves
    nothing, the update never opposes Σ u_i, and it vanishes continuously with it. Tasks of zero
    norm are left out.

    Tune its outer rate: the step is as long as the mean's for equal tasks, n (1 + λ) / (1 + n λ)
    times as long for orthogonal ones of one norm, and never longer than τ (1 + λ) / (2 √λ). The
    weights are constants of differentiation. The Gram matrix is formed in one read of the signals,
    in the arithmetic of ``torch.set_float32_matmul_precision``, which is to be left at "highest".

    In float32 the weights have a relative error of their norm below 4 eps / λ (λ ≥ 1e-4, n ≤ 256).
    It cannot hold the weight of a task whose norm is some 3e38 times the median or more: that is
    0, and the update lacks its share. float64 signals hold it.

    Args:
        damping: λ > 0, relative to the units' squared norms: large values lead to the mean of the
            u_i times τ, small ones to exact equality, if the tasks are independent.
        similarity: "cosine"; or "inner", (1 + λ) (G/(n τ²) + λ I)⁻¹ 1/n with G_ij = g_i · g_j,
            under which small tasks have less to say, and the limit of large λ is the mean.
        scope: "global", one weight a task over all parameters; "leaf", one for each parameter
            tensor; or a callable from a leaf's path to the name of its group.
        match_norm: None; "mean" or an aggregator of the same scope: its update's norm.
        nonfinite: as in :class:`gradagree_opt.GradientAgreement`.

    Raises:
        ValueError: an option has none of these values.

    Source: ours; docs/equal-agreement.md has the derivation. For λ → 0 its direction is, up to
    the sign, that of IMTL-G (Liu et al. 2021), for independent tasks; with "inner" it is a damped
    natural gradient of the tasks.

    >>> import gradagree_opt as ga
    >>> grads = torch.tensor([[4.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    >>> result = ga.EqualAgreement().aggregate(grads)
    >>> result.update
    tensor([1.9612, 1.9901])
    >>> result.diagnostics.agreement_spread  # of the mean 0.124
    tensor(0.0049)
    """

    def __init__(
        self,
        *,
        damping: float = 0.01,
        similarity: Literal["inner", "cosine"] = "cosine",
        scope: Scope = "global",
        match_norm: Literal["mean"] | Aggregator | None = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        weighting = EqualWeighting(damping=damping, similarity=similarity)
        super().__init__(weighting, scope=scope, match_norm=match_norm, nonfinite=nonfinite)


class GramianPower(Aggregator):
    """Weights Mᵏ 1/n, scaled so that equal tasks give the mean: a family of controls.

    M is G / λ_max(G) for k > 0 and (G/(n τ²) + λ I) / (1 + λ) for k < 0, G the Gram matrix
    g_i · g_j, λ_max its largest eigenvalue and τ the median norm.
    As Jᵀ Gᵏ 1 = Cᵏ Jᵀ 1 with C = Jᵀ J, its update is the mean preconditioned by the k-th power of
    the tasks' second moment: k = 0 is the mean, 1 Gradient Agreement up to its length; larger
    powers go to one dominant direction. −1 is Equal Agreement with similarity="inner". Tasks of
    zero norm are left out, but for k = 0. For small λ, −1/2 has the direction of Aligned-MTL where
    the tasks are independent. For the eigenvalues the host may wait for a GPU. In float32 no norm
    may be more than 1e18 times the median.

    Args:
        power: k, any number.
        damping: λ > 0, of negative powers.
        scope, match_norm, nonfinite: as in :class:`EqualAgreement`.

    Raises:
        ValueError: an option has none of its values.

    Source: ours; Senushkin et al. 2023 (Aligned-MTL) for k = −1/2.

    >>> import gradagree_opt as ga
    >>> grads = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> [ga.GramianPower(k)(grads) for k in (-1, 0, 1)]
    [tensor([0.9806, 0.9951]), tensor([0.3333, 0.6667]), tensor([0.1667, 0.6667])]
    """

    def __init__(
        self,
        power: float | int,
        *,
        damping: float = 0.01,
        scope: Scope = "global",
        match_norm: Literal["mean"] | Aggregator | None = None,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        weighting = PowerWeighting(power=power, damping=damping)
        super().__init__(weighting, scope=scope, match_norm=match_norm, nonfinite=nonfinite)
