"""Gradient Agreement from the paper's formulas, by way of the N×N Gram matrix.

Every function takes the Gram matrix G_ij = g_i · g_j as a NumPy array: of Fractions (then all but
cosine and softmax is exact arithmetic) or of float64.
"""

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]


def exact(values: Iterable[Any]) -> Array:
    """The numbers (nested sequences, or a tensor of any dtype) as Fractions, without rounding."""
    if isinstance(values, Tensor):
        values = values.detach().double().numpy()
    return np.vectorize(Fraction, otypes=[object])(np.asarray(values))


def gram(matrix: Array) -> Array:
    return matrix @ matrix.T


def scores(gram: Array, *, similarity: str = "inner", include_self: bool = True) -> Array:
    """s_i = Σ_j g_i · g_j, step 3 of the paper's algorithm."""
    if similarity == "cosine":
        gram = cosines(gram)
    return gram.sum(1) if include_self else (gram - np.diag(np.diag(gram))).sum(1)


def cosines(gram: Array) -> Array:
    """cos(g_i, g_j) in float64; 0 where a signal is zero."""
    norms = np.array([math.sqrt(square) for square in np.diag(gram)])
    products = np.outer(norms, norms)
    return np.divide(gram.astype(float), products, out=np.zeros_like(products), where=products > 0)


def agreement(
    gram: Array,
    *,
    similarity: str = "inner",
    include_self: bool = True,
    negative: str = "keep",
    normalization: str = "l1",
    temperature: float = 1.0,
    degenerate: str = "uniform",
) -> Array:
    """w_i = s_i / Σ_k |s_k|, step 4, and the ablation axes as the documentation defines them."""
    n = len(gram)
    values = scores(gram, similarity=similarity, include_self=include_self)
    if negative == "clip":
        values = np.maximum(values, 0)
    total = abs(values).sum()
    if total <= (1e-12 * n if similarity == "cosine" else 0):
        return uniform(gram) * (degenerate == "uniform")
    if normalization == "l1":
        return values / total
    logits = (values * n / total).astype(float) / temperature
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def uniform(gram: Array) -> Array:
    return np.array([Fraction(1, len(gram))] * len(gram))


def norm_shares(gram: Array) -> Array:
    """‖g_i‖² / Σ_j ‖g_j‖²; uniform where all are zero."""
    squares = np.diag(gram)
    return squares / squares.sum() if squares.sum() else uniform(gram)


def length_shares(gram: Array) -> Array:
    """‖g_i‖ / Σ_j ‖g_j‖; uniform where all are zero."""
    lengths = np.array([math.sqrt(square) for square in np.diag(gram)])
    return lengths / lengths.sum() if lengths.sum() else uniform(gram)


def relative_norms(gram: Array) -> Array:
    """‖g_i‖ in units of the median of those that are not zero; zeros where all are."""
    norms = np.array([math.sqrt(square) for square in np.diag(gram)])
    return norms / np.median(norms[norms > 0]) if norms.any() else norms


def equal_scores(gram: Array, *, damping: float = 0.01, similarity: str = "cosine") -> Array:
    """(1 + λ) (D Ĝ D/n + λ I)⁻¹ 1/n of the n tasks that are not zero, D = I for the cosine."""
    norms, scores = relative_norms(gram), np.zeros(len(gram))
    there = norms > 0
    n = there.sum()
    if n:
        matrix = damped(gram, damping, similarity)[np.ix_(there, there)]
        scores[there] = (1 + damping) * np.linalg.solve(matrix, np.ones(n) / n)
    return scores


def damped(gram: Array, damping: float, similarity: str) -> Array:
    norms = relative_norms(gram)
    sizes = norms if similarity == "inner" else (norms > 0).astype(float)
    count = max(1, (norms > 0).sum())
    return cosines(gram) * np.outer(sizes, sizes) / count + damping * np.eye(len(gram))


def equal(gram: Array, *, damping: float = 0.01, similarity: str = "cosine") -> Array:
    """The weights of Equal Agreement: scores times τ / ‖g_i‖, for "inner" the scores."""
    scores, norms = equal_scores(gram, damping=damping, similarity=similarity), relative_norms(gram)
    if similarity == "inner":
        return scores
    return np.divide(scores, norms, out=np.zeros(len(gram)), where=norms > 0)


def gramian_power(gram: Array, power: int) -> Array:
    """(G/λ_max)ᵏ 1/n for whole k > 0, of the n tasks that are not zero; for k = 0 the mean."""
    if power == 0:
        return np.full(len(gram), 1 / len(gram))
    norms = relative_norms(gram)
    weights = (norms > 0) / max(1, (norms > 0).sum())
    matrix = cosines(gram) * np.outer(norms, norms)
    if norms.any():
        weights = np.linalg.matrix_power(matrix / np.linalg.eigvalsh(matrix).max(), power) @ weights
    return weights


def norm_clipped(gram: Array) -> Array:
    """min(1, τ / ‖g_i‖) / n."""
    return 1 / np.maximum(1, relative_norms(gram)) / len(gram)


def geometric_median(gram: Array, *, iterations: int = 16, smoothing: float = 1e-3) -> Array:
    """Weiszfeld's steps from the mean of clipped norms, on distances in units of τ."""
    norms, weights = relative_norms(gram), norm_clipped(gram)
    gram = cosines(gram) * np.outer(norms, norms)
    for _ in range(iterations):
        squares = np.diag(gram) - 2 * gram @ weights + weights @ gram @ weights
        weights = 1 / np.sqrt(np.maximum(squares, smoothing**2))
        weights = weights / weights.sum()
    return weights


def norm(gram: Array, weights: Array) -> float:
    """‖Σ_i w_i g_i‖."""
    weights = weights.astype(gram.dtype)
    return math.sqrt(weights @ gram @ weights)


def with_norm_of(gram: Array, weights: Array, others: Array) -> Array:
    """The weights rescaled so that ‖Σ_i w_i g_i‖ is what the other weights give.

    A zero vector has no length to change: its weights stay as they are.
    """
    length = norm(gram, weights)
    return weights.astype(float) * (norm(gram, others) / length if length else 1.0)
