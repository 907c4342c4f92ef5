"""Functions of small symmetric positive definite matrices, on the device alone, in every transform.

They compile without a warning. Inductor has no kernel for a solver or for eigenvalues, and says so
at every compilation: to it these are operators.
"""

from typing import Any

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.blocks import or_one


def diagonal(matrix: Float[Tensor, "*groups n n"], /) -> Float[Tensor, "*groups n"]:
    """The entries on the diagonal."""
    if not torch.compiler.is_compiling():
        return matrix.diagonal(dim1=-2, dim2=-1)
    # Which compiles with a warning: inductor calls what torch deprecates (torch 2.14).
    index = torch.arange(matrix.shape[-1], device=matrix.device)
    return matrix[..., index, index]


def solve(
    matrix: Float[Tensor, "*groups n n"], vector: Float[Tensor, "*groups n"], /
) -> Float[Tensor, "*groups n"]:
    """matrix⁻¹ vector by Cholesky's factors; NaN where rounding leaves the matrix indefinite."""
    function = _solve_operator if torch.compiler.is_compiling() else _solve
    solution: Tensor = function(matrix, vector)
    return solution


def power(
    matrix: Float[Tensor, "*groups n n"],
    vector: Float[Tensor, "*groups n"],
    exponent: float | int,
    /,
) -> Float[Tensor, "*groups n"]:
    """matrix^exponent vector, for a positive exponent in units of the largest eigenvalue.

    Eigenvalues below 0 are rounding, and taken for 0.
    """
    function = _power_operator if torch.compiler.is_compiling() else _power
    product: Tensor = function(matrix, vector, float(exponent))
    return product


def _solve(matrix: Tensor, vector: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    # Not cholesky_solve: of batches, MAGMA's keeps pointers on the host, and is in no CUDA graph.
    half = torch.linalg.solve_triangular(factor, vector.unsqueeze(-1), upper=False)
    solution = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)
    known: Tensor = solution.masked_fill((info > 0).unsqueeze(-1), torch.nan)
    return known


def _power(matrix: Tensor, vector: Tensor, exponent: float) -> Tensor:
    finite = torch.isfinite(matrix).all(-1, keepdim=True).all(-2, keepdim=True)
    wide = vector.dtype if vector.device.type == "mps" else torch.float64  # which mps lacks
    # Rows of different sizes spoil the small eigenvalues, least if the largest row comes first.
    order = diagonal(matrix).argsort(-1, descending=True).unsqueeze(-1)
    graded = matrix.take_along_dim(order, -2).take_along_dim(order.mT, -1).to(wide)
    values, vectors = torch.linalg.eigh(torch.where(finite, graded, 0))  # which raises at NaN
    values = values.clamp(min=0)
    if exponent > 0:
        values = values / or_one(values[..., -1:])
    vectors = vectors.take_along_dim(order.argsort(-2), -2)
    column = vector.to(wide).unsqueeze(-1)
    product = vectors @ (values.pow(exponent).unsqueeze(-1) * (vectors.mT @ column))
    return torch.where(finite, product, torch.nan).squeeze(-1).to(vector.dtype)


def _operator(name: str, function: Any) -> Any:
    """The function of a matrix and a vector as an operator that a compiler does not look into."""
    operator = torch.library.custom_op(f"gradagree_opt::{name}", function, mutates_args=())

    def batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        tensors = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(arguments[:2], in_dims[:2], strict=True)
        ]
        return operator(*tensors, *arguments[2:]), 0

    operator.register_fake(lambda _, vector, *__: torch.empty_like(vector))
    operator.register_vmap(batched)
    return operator


_solve_operator = _operator("solve", _solve)
_power_operator = _operator("power", _power)
