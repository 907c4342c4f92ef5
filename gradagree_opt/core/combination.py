"""Apply: Σ_i w_i · row i of a task-stacked pytree, and its norm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.core.blocks import column_blocks, rows
from gradagree_opt.core.devices import fused_kernels
from gradagree_opt.core.results import Combine, Measured
from gradagree_opt.core.stacks import PyTree, full_precision, leaves_of, like, tree_norm


def with_norm(
    combine_directions: Combine, measured: Measured
) -> Callable[[Tensor], tuple[PyTree, Tensor]]:
    """From weights to the update and its norm, which a stack's combination tells along with it."""

    def combined(weights: Tensor) -> tuple[PyTree, Tensor]:
        if hasattr(combine_directions, "and_norm"):
            together: tuple[PyTree, Tensor] = combine_directions.and_norm(weights, measured.groups)
            return together
        update = combine_directions(weights, measured.groups)
        return update, tree_norm(update, scaled=measured.scaled)

    return combined


@dataclass(frozen=True)
class Combination:
    """Σ_i w_i · row i of a task-stacked pytree as a function of the weights, and its norm.

    ``scaled``: of the norm, as in :func:`tree_norm`.
    """

    stack: PyTree
    scaled: bool

    def __call__(
        self, weights: Float[Tensor, "*groups n"], groups: Sequence[int] | None, /
    ) -> PyTree:
        """:func:`combine` of the stack."""
        return self.and_norm(weights, groups)[0]

    def wide(self, weights: Float[Tensor, "*groups n"], groups: Sequence[int] | None, /) -> PyTree:
        """:func:`combine` of the stack, in what it is accumulated in: as a part of a larger sum."""
        return combine(self.stack, weights, groups, wide=True)

    def and_norm(
        self, weights: Float[Tensor, "*groups n"], groups: Sequence[int] | None, /
    ) -> tuple[PyTree, Float[Tensor, ""]]:
        """:func:`combine` of the stack and :func:`tree_norm` of that, in one launch on a GPU."""
        leaves = leaves_of(self.stack)
        if kernels := fused_kernels(leaves):
            sums, norm = kernels.combine(leaves, weights, groups)
            return like(self.stack, sums), norm
        update = combine(self.stack, weights, groups)
        return update, tree_norm(update, scaled=self.scaled)


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
