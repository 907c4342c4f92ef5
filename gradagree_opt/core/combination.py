"""Apply: Σ_i w_i · row i of a task-stacked pytree, and its norm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.blocks import column_blocks, rows
from gradagree_opt.core.devices import fused_kernels
from gradagree_opt.core.results import Measured
from gradagree_opt.core.stacks import (
    PyTree,
    full_precision,
    is_coarse,
    leaves_of,
    like,
    tree_norm,
)


@dataclass(frozen=True)
class Combination:
    """Σ_i w_i · row i of a task-stacked pytree, and its norm, as functions of the weights."""

    stack: PyTree

    def __call__(
        self, weights: Float[Tensor, "*groups n"], groups: Sequence[int] | None, /
    ) -> PyTree:
        """:func:`combine` of the stack."""
        leaves = leaves_of(self.stack)
        if kernels := fused_kernels(leaves):
            return like(self.stack, kernels.combine(leaves, weights, groups)[0])
        return combine(self.stack, weights, groups)

    @property
    def is_coarse(self) -> bool:
        """Whether the stack has less than the precision of float32."""
        return is_coarse(leaves_of(self.stack))

    def wide(self, weights: Float[Tensor, "*groups n"], groups: Sequence[int] | None, /) -> PyTree:
        """:func:`combine` of the stack in float32 or better, for sums that go on."""
        if not self.is_coarse:
            return self(weights, groups)
        return combine(self.stack, weights, groups, wide=True)

    def and_norm(
        self, weights: Float[Tensor, "*groups n"], measured: Measured, /
    ) -> tuple[PyTree, Float[Tensor, ""]]:
        """:func:`combine` of the stack and :func:`tree_norm` of that, in one launch on a GPU."""
        leaves = leaves_of(self.stack)
        if kernels := fused_kernels(leaves):
            sums, norm = kernels.combine(leaves, weights, measured.groups)
            return like(self.stack, sums), norm
        update = combine(self.stack, weights, measured.groups)
        return update, tree_norm(update, scaled=measured.scaled)


def combine(
    stack: PyTree,
    weights: Float[Tensor, "*groups n"],
    groups: Sequence[int] | None = None,
    /,
    *,
    wide: bool = False,
) -> PyTree:
    """Σ_i w_i · row i for every leaf, accumulated in float32 or better, in the leaf's own dtype.

    Args:
        stack: task-stacked pytree.
        weights: ``[n]``, or ``[groups, n]`` with the group of every leaf in ``groups``.
        groups: index of the group of every leaf, or None where there is one for all.
        wide: leaves the sums in float32 or better.
    """
    leaves = leaves_of(stack)
    with full_precision(leaves[0].device):
        sums = [
            _weighted_sum(leaf, weights if groups is None else weights[groups[index]])
            for index, leaf in enumerate(leaves)
        ]
    if not wide:
        sums = [total.to(leaf.dtype) for total, leaf in zip(sums, leaves, strict=True)]
    return like(stack, sums)


def _weighted_sum(leaf: Tensor, weights: Tensor) -> Tensor:
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    weights = weights.to(dtype)
    if leaf.dtype == dtype or not leaf.numel():
        total = torch.mv(rows(leaf).to(dtype).T, weights)
    else:  # by blocks: no copy of the whole leaf in the larger dtype
        total = torch.cat([torch.mv(block.T, weights) for block in column_blocks(leaf, dtype)])
    return total.reshape(leaf.shape[1:])
