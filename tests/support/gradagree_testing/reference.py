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
