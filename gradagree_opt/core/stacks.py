"""Task-stacked pytrees: every leaf is a tensor ``[n, *shape]`` whose first axis is the task.

Leaves are never concatenated: each function visits them one by one.
"""

from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.blocks import absolute_maxima, blocks_of_all, or_one, unit_parts
from gradagree_opt.core.devices import fused_kernels

PyTree = Any
"""A tensor, or any nesting of dicts, lists, tuples and named tuples of tensors."""


def leaves_of(tree: PyTree, /) -> list[Any]:
    """The leaves in order, as ``tree_leaves`` gives them."""
    if _is_flat(tree):
        return list(tree.values())
    return tree_leaves(tree)


def like(tree: PyTree, leaves: list[Tensor], /) -> PyTree:
    """The leaves in the structure of the tree."""
    if _is_flat(tree):
        return dict(zip(tree, leaves, strict=True))
    return tree_unflatten(leaves, tree_structure(tree))


def _is_flat(tree: PyTree) -> bool:
    """Whether it is a dict of tensors, which are listed faster than by torch's pytrees."""
    return type(tree) is dict and all(isinstance(leaf, Tensor) for leaf in tree.values())


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
    stack: PyTree,
    /,
    name: str,
    advice: str = "give every leaf the task axis first; pad tasks of unequal size, with a mask in "
    "the loss, or loop over them with TaskBatch",
    *,
    least: int = 1,
) -> int:
    """Number of tasks n that every leaf of a task-stacked pytree has as its first axis.

    Args:
        stack: pytree whose leaves are tensors ``[n, *shape]``.
        name: what the stack holds, for the messages.
        advice: what to do about task axes that differ.
        least: 0 where there may be no task.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: there is no leaf, no task, or the task axes differ.
    """
    leaves = leaves_of(stack)
    if not leaves:
        raise ValueError(
            f"expected {name} with at least one tensor, found an empty pytree; "
            "pass a tensor [n, *shape] or a dict, list or tuple of them"
        )
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"expected every leaf of the {name} to be a tensor, found {type(leaf).__name__}"
                f"{_place(stack, index)}; {_instead_of(leaf, stacked=True)}"
            )
        if leaf.is_nested:
            raise ValueError(
                f"expected tasks of one size in the {name}, found a nested tensor"
                f"{_place(stack, index)}; pad the tasks, with a mask in the loss, or loop over "
                "them with TaskBatch"
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
    if n < least:
        raise ValueError(
            f"expected {name} of at least one task, found an empty task axis; "
            "skip the step when the batch has no tasks"
        )
    return n


def check_stack(stack: PyTree, /, name: str = "gradients", *, least: int = 1) -> int:
    """:func:`task_count` of a stack that is to be aggregated: every leaf is floating-point.

    Raises:
        TypeError: a leaf is not a dense floating-point tensor.
        ValueError: as :func:`task_count`, or the leaves lie on several devices.
    """
    n = task_count(
        stack,
        name,
        "per-parameter gradients of one task, or a list of tasks, are to be stacked first: one "
        "tensor [n, *shape] for each parameter",
        least=least,
    )
    check_floating(stack, name)
    leaves = leaves_of(stack)
    for index, leaf in enumerate(leaves):
        if leaf.device != leaves[0].device:
            raise ValueError(
                f"expected {name} on one device, found {leaves[0].device}{_place(stack, 0)} and "
                f"{leaf.device}{_place(stack, index)}; bring them to one, as by leaf.to('cpu')"
            )
    return n


def check_floating(tree: PyTree, /, name: str) -> None:
    """Raises a TypeError or ValueError unless every leaf is a dense tensor of floats."""
    leaves = leaves_of(tree)
    if not leaves:
        raise ValueError(
            f"expected {name} with at least one floating-point tensor, found an empty pytree"
        )
    for index, leaf in enumerate(leaves):
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        if not floating or leaf.dtype.itemsize == 1:  # float8, with which torch does not compute
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            several = len(leaves) > 1 and not floating
            fix = "give it as float()"
            if several:  # BatchNorm's variance, of floats, could become negative in an update
                fix = (
                    "leave out what has no gradient, as every buffer of a state_dict: keep the "
                    "names of named_parameters()"
                )
            if not isinstance(leaf, Tensor):
                fix = _instead_of(leaf, stacked=False)
            elif leaf.is_complex():
                fix = "hold it as torch.view_as_real(…), and take view_as_complex(…) in the loss"
            raise TypeError(
                f"expected floating-point {name}, found {found}{_place(tree, index)}; {fix}"
            )
        if leaf.layout is not torch.strided:
            raise TypeError(
                f"expected dense {name}, found {leaf.layout}{_place(tree, index)}; give "
                "leaf.to_dense()"
            )


def _instead_of(leaf: object, *, stacked: bool) -> str:
    """What to give instead of something that is no tensor."""
    kind = type(leaf).__name__
    first = ", with the task axis first" if stacked else ""
    if leaf is None:
        zeros = ", or give zeros for a parameter that a task does not use" if stacked else ""
        return f"leave the entry out{zeros}"
    if isinstance(leaf, nn.Module) and not stacked:
        return "give dict(module.named_parameters())"
    if isinstance(leaf, Mapping | ItemsView):
        return f"give dict({kind}), its values tensors{first}"
    if is_dataclass(leaf):
        return f"give vars({kind}), its values tensors{first}"
    if isinstance(leaf, Iterator | ValuesView):
        named = f"give list({kind}), or dict({kind}) of named_parameters()"
        return f"give torch.stack(list({kind})){first}" if stacked else named
    if isinstance(leaf, str | nn.Module):
        return f"leave it out, or give tensors{first}"
    return f"give torch.as_tensor(…){first}"


def _place(tree: PyTree, index: int) -> str:
    """Where a leaf is, for a message; nothing if it is the whole tree."""
    path = leaf_paths(tree)[index]
    return f" in {path!r}" if path else ""


def accumulation_dtype(leaves: Sequence[Tensor], /) -> torch.dtype:
    """float32, or float64 where a leaf has it: what sums over the leaves are kept in."""
    if any(leaf.dtype == torch.float64 for leaf in leaves):
        return torch.float64
    return torch.float32


def is_coarse(tensors: Iterable[Tensor], /) -> bool:
    """Whether one of them has less than the precision of float32."""
    return any(tensor.dtype.itemsize < torch.float32.itemsize for tensor in tensors)


def full_precision(device: torch.device, /) -> AbstractContextManager[Any]:
    """Switches autocast off inside the block, where it is on."""
    kind = device.type
    # Older torch.compile cannot ask (torch 2.11), and knows no device without autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    if available and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def row_magnitudes(leaves: Sequence[Tensor], /) -> Float[Tensor, " n"]:
    """Largest absolute entry of every task over all leaves; NaN or inf where a task has one."""
    dtype = accumulation_dtype(leaves)
    magnitudes = [absolute_maxima(block) for block in blocks_of_all(leaves)]
    if not magnitudes:
        return leaves[0].new_zeros(leaves[0].shape[0], dtype=dtype)
    return torch.stack([magnitude.to(dtype) for magnitude in magnitudes]).amax(0)


def tree_norm(tree: PyTree, /, *, scaled: bool = True) -> Float[Tensor, ""]:
    """Euclidean norm over all leaves, a constant, safe at every scale that the leaves can hold.

    Without scaling it is faster, and NaN where its square is not :func:`in_range`.
    """
    leaves = [leaf.detach() for leaf in leaves_of(tree)]
    dtype = accumulation_dtype(leaves)
    parts = [torch.zeros(2, dtype=dtype, device=leaves[0].device)]
    for size, blocks in unit_parts([leaf.unsqueeze(0) for leaf in leaves], dtype, scaled=scaled):
        # Under vmap, a norm without dim is one over all problems (torch 2.14).
        norms = torch.cat([torch.linalg.vector_norm(block, dim=1) for block in blocks])
        parts.append(torch.stack([size, torch.linalg.vector_norm(norms, dim=0)]))
    sizes, norms = torch.stack(parts).unbind(1)
    largest = sizes.amax()
    norm: Tensor = largest * torch.linalg.vector_norm(norms * (sizes / or_one(largest)), dim=0)
    lost = ~in_range(norm.square())
    return norm if scaled else norm.masked_fill(lost, torch.nan)


def in_range(square: Float[Tensor, "*shape"], /) -> Bool[Tensor, "*shape"]:
    """Whether sums of squares, and their own squares, are far from both ends of their dtype."""
    limits = torch.finfo(square.dtype)
    inside: Tensor = (square > limits.tiny**0.5) & (square < limits.max**0.4)
    return inside


def scaled_square_sums(
    leaves: Sequence[Tensor], divisors: Float[Tensor, " n"], /
) -> Float[Tensor, " n"]:
    """‖g_i / divisor_i‖² of every task over all leaves."""
    column = divisors.unsqueeze(1)
    norms = [
        torch.linalg.vector_norm(block / column, dim=1)
        for block in blocks_of_all(leaves, divisors.dtype)
    ]
    return torch.stack(norms).square().sum(0) if norms else torch.zeros_like(divisors)


def nonfinite_tasks(directions: PyTree, signal: PyTree | None, /) -> Bool[Tensor, " n"]:
    """The tasks with a NaN or infinite entry in either stack."""
    leaves = leaves_of(directions) + ([] if signal is None else leaves_of(signal))
    leaves = [leaf.detach() for leaf in leaves]
    if kernels := fused_kernels(leaves):
        finite: Tensor = kernels.row_sums(leaves).finite
        return ~finite
    return ~torch.isfinite(row_magnitudes(leaves))


def mask_rows(stack: PyTree, keep: Bool[Tensor, " n"], /) -> PyTree:
    """The stack with zeros in place of every task that is not kept, NaN and inf included."""
    return tree_map(
        lambda leaf: torch.where(
            keep.reshape(-1, *([1] * (leaf.ndim - 1))), leaf, leaf.new_zeros(())
        ),
        stack,
    )
