"""Task-stacked pytrees: every leaf is a tensor ``[n, *shape]`` whose first axis is the task.

Leaves are never concatenated: each function visits them one by one.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)

from gradagree_opt.annotations import Bool, Float

PyTree = Any
"""A tensor, or any nesting of dicts, lists, tuples and named tuples of tensors."""

BLOCK_ENTRIES = 2**20
"""Entries of a block that a CPU reads several times: 4 MiB of float32, half or less of a cache."""


def leaf_paths(tree: PyTree, /) -> list[str]:
    """Names of the leaves in order, keys joined by dots.

    >>> leaf_paths({"layer": {"weight": torch.zeros(2), "bias": torch.zeros(1)}})
    ['layer.weight', 'layer.bias']
    """
    paths, _ = tree_flatten_with_path(tree)
    return [".".join(_key_name(key) for key in path) for path, _ in paths]


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def task_count(
    stack: PyTree, /, name: str, advice: str = "give every leaf the task axis first"
) -> int:
    """Number of tasks n that every leaf of a task-stacked pytree has as its first axis.

    Args:
        stack: pytree whose leaves are tensors ``[n, *shape]``.
        name: what the stack holds, for the messages.
        advice: what to do about task axes that differ.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: there is no leaf, no task, or the task axes differ.
    """
    leaves = tree_leaves(stack)
    if not leaves:
        raise ValueError(
            f"expected {name} with at least one tensor, found an empty pytree; "
            "pass a tensor [n, *shape] or a dict, list or tuple of them"
        )
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"expected every leaf of the {name} to be a tensor, found {type(leaf).__name__}"
                f"{_place(stack, index)}; give zeros for a parameter that a task does not use"
            )
        if leaf.ndim == 0:
            raise ValueError(
                f"expected every leaf of the {name} to have the task axis first, found a tensor "
                f"without axes{_place(stack, index)}; stack the tasks along a new axis"
            )
    n = int(leaves[0].shape[0])
    for index, leaf in enumerate(leaves):
        if leaf.shape[0] != n:
            raise ValueError(
                f"expected every leaf of the {name} to have the same task axis, found {n}"
                f"{_place(stack, 0)} and {leaf.shape[0]}{_place(stack, index)}; {advice}"
            )
    if n == 0:
        raise ValueError(
            f"expected {name} of at least one task, found an empty task axis; "
            "skip the step when the batch has no tasks"
        )
    return n


def check_stack(stack: PyTree, /, name: str = "gradients") -> int:
    """:func:`task_count` of a stack that is to be aggregated: every leaf is floating-point.

    Raises:
        TypeError: a leaf is not a floating-point tensor.
        ValueError: as :func:`task_count`.
    """
    n = task_count(
        stack,
        name,
        "per-parameter gradients of one task, or a list of tasks, are to be stacked first: one "
        "tensor [n, *shape] for each parameter",
    )
    check_floating(stack, name)
    return n


def check_floating(tree: PyTree, /, name: str) -> None:
    """TypeError or ValueError in one sentence unless every leaf is a floating-point tensor."""
    leaves = tree_leaves(tree)
    if not leaves:
        raise ValueError(
            f"expected {name} with at least one floating-point tensor, found an empty pytree"
        )
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"expected floating-point {name}, found {found}{_place(tree, index)}; "
                "leave out what has no gradient"
            )


def _place(tree: PyTree, index: int) -> str:
    """Where a leaf is, for a message; nothing if it is the whole tree."""
    path = leaf_paths(tree)[index]
    return f" in {path!r}" if path else ""


def accumulation_dtype(leaves: Sequence[Tensor], /) -> torch.dtype:
    """float32, or float64 where a leaf has it: what sums over the leaves are kept in."""
    if any(leaf.dtype == torch.float64 for leaf in leaves):
        return torch.float64
    return torch.float32


def full_precision(device: torch.device, /) -> AbstractContextManager[Any]:
    """Switches autocast off inside the block, where it is on."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def column_blocks(
    leaf: Float[Tensor, "n ..."], dtype: torch.dtype, /
) -> Iterator[Float[Tensor, "n columns"]]:
    """The leaf as matrices ``[n, columns]`` of the dtype that fit a processor's cache together.

    What is done to one block before the next is asked for costs one read of the leaf, however
    often it looks at the block. One block where a compiler or a GPU does better with the whole.
    """
    matrix = rows(leaf)
    whole = leaf.device.type != "cpu" or torch.compiler.is_compiling()
    if whole or matrix.numel() <= BLOCK_ENTRIES:
        blocks: Sequence[Tensor] = [matrix] if matrix.numel() else []
    else:
        width = max(1, BLOCK_ENTRIES // matrix.shape[0])
        blocks = [matrix[:, at : at + width] for at in range(0, matrix.shape[1], width)]
    return (block.to(dtype) for block in blocks)


def unit_scaled(
    matrix: Float[Tensor, "n columns"], /
) -> tuple[Float[Tensor, "n columns"], Float[Tensor, ""]]:
    """The matrix in units of its scale, and the scale (0 where all entries are zero).

    That is the power of two below the largest finite entry, so that nothing is rounded.
    """
    size = _absolute_maxima(matrix).nan_to_num(0.0, 0.0, 0.0).amax()
    scale = size / (2 * or_one(torch.frexp(size).mantissa))
    return matrix / or_one(scale), scale


def row_magnitudes(leaves: Sequence[Tensor], /) -> Float[Tensor, " n"]:
    """Largest absolute entry of every task over all leaves; NaN or inf where a task has one."""
    dtype = accumulation_dtype(leaves)
    magnitudes = [
        _absolute_maxima(block) for leaf in leaves for block in column_blocks(leaf, leaf.dtype)
    ]
    if not magnitudes:
        return leaves[0].new_zeros(leaves[0].shape[0], dtype=dtype)
    return torch.stack([magnitude.to(dtype) for magnitude in magnitudes]).amax(0)


def _absolute_maxima(matrix: Float[Tensor, "n columns"]) -> Float[Tensor, " n"]:
    # vector_norm of order inf says the same in ten times the time on a CPU (torch 2.14).
    return torch.maximum(matrix.amax(1), matrix.amin(1).neg())


def tree_norm(tree: PyTree, /, *, scaled: bool = True) -> Float[Tensor, ""]:
    """Euclidean norm over all leaves, a constant, safe at every scale that the leaves can hold.

    Without scaling it is faster, and NaN where its square is not :func:`in_range`.
    """
    leaves = [leaf.detach() for leaf in tree_leaves(tree)]
    dtype = accumulation_dtype(leaves)
    parts = [torch.zeros(2, dtype=dtype, device=leaves[0].device)]
    for leaf in leaves:
        for block in column_blocks(leaf.unsqueeze(0), dtype):
            matrix, size = unit_scaled(block) if scaled else (block, block.new_ones(()))
            # Under vmap, a norm without dim is one over all problems (torch 2.14).
            parts.append(torch.stack([size, torch.linalg.vector_norm(matrix, dim=1).squeeze(0)]))
    sizes, norms = torch.stack(parts).unbind(1)
    largest = sizes.amax()
    norm: Tensor = largest * torch.linalg.vector_norm(norms * (sizes / or_one(largest)), dim=0)
    lost = ~in_range(norm.square())
    return norm if scaled else norm.masked_fill(lost, torch.nan)


def in_range(square: Float[Tensor, ""], /) -> Bool[Tensor, ""]:
    """Whether a sum of squares is so far from both ends of its dtype that it lost nothing there."""
    limits = torch.finfo(square.dtype)
    inside: Tensor = (square > limits.tiny**0.5) & (square < limits.max**0.75)
    return inside


def scaled_square_sums(
    leaves: Sequence[Tensor], divisors: Float[Tensor, " n"], /
) -> Float[Tensor, " n"]:
    """‖g_i / divisor_i‖² of every task over all leaves."""
    column = divisors.unsqueeze(1)
    norms = [
        torch.linalg.vector_norm(block / column, dim=1)
        for leaf in leaves
        for block in column_blocks(leaf, divisors.dtype)
    ]
    return torch.stack(norms).square().sum(0) if norms else torch.zeros_like(divisors)


def or_one(values: Tensor, /) -> Tensor:
    """The values, with 1 in place of zeros: safe to divide by."""
    return torch.where(values == 0, torch.ones_like(values), values)


def mask_rows(stack: PyTree, keep: Bool[Tensor, " n"], /) -> PyTree:
    """The stack with zeros in place of every task that is not kept, NaN and inf included."""
    return tree_map(
        lambda leaf: torch.where(
            keep.reshape(-1, *([1] * (leaf.ndim - 1))), leaf, leaf.new_zeros(())
        ),
        stack,
    )


def combine(
    stack: PyTree, weights: Float[Tensor, "*groups n"], groups: Sequence[int] | None = None, /
) -> PyTree:
    """Σ_i w_i · row i for every leaf, accumulated in float32 or better, in the leaf's own dtype.

    Args:
        stack: task-stacked pytree.
        weights: ``[n]``, or ``[groups, n]`` with the group of every leaf in ``groups``.
        groups: index of the group of every leaf, or None where there is one for all.
    """
    leaves = tree_leaves(stack)
    with full_precision(leaves[0].device):
        sums = [
            _weighted_sum(leaf, weights if groups is None else weights[groups[index]])
            for index, leaf in enumerate(leaves)
        ]
    return tree_unflatten(sums, tree_structure(stack))


def rows(leaf: Float[Tensor, "n ..."], /) -> Float[Tensor, "n d"]:
    """The leaf as a matrix with one row a task, also where a task's entry has no axes."""
    return leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1)


def _weighted_sum(leaf: Tensor, weights: Tensor) -> Tensor:
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    weights = weights.to(dtype)
    if leaf.dtype == dtype or not leaf.numel():
        total = weights @ rows(leaf).to(dtype)
    else:  # by blocks: no copy of the whole leaf in the larger dtype
        total = torch.cat([weights @ block for block in column_blocks(leaf, dtype)])
    return total.reshape(leaf.shape[1:]).to(leaf.dtype)
