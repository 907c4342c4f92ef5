"""Apply over ranks: Σ_i w_i · direction_i of all tasks from each rank's own, and its norm."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradagree_opt.core.combination import Combination
from gradagree_opt.core.results import Combine, Measured
from gradagree_opt.core.stacks import PyTree, leaves_of, like

if TYPE_CHECKING:
    from gradagree_opt.core.ranks import Ranks


class Summed:
    """Σ_i w_i · direction_i over the tasks of all ranks as a function of the weights.

    ``wide``: leaves the sums in float32 or better.
    """

    def __init__(
        self, ranks: "Ranks", combine_directions: Combine, measured: Measured, *, wide: bool
    ) -> None:
        self._ranks = ranks
        self._measured = measured
        self._wide = wide
        if isinstance(combine_directions, Combination):
            # One rank's part may be larger than its dtype can hold.
            combine_directions = combine_directions.wide
        self._combine = combine_directions

    def __call__(self, weights: Tensor, groups: list[int] | None, /) -> PyTree:
        """This rank's part of the update.

        Raises:
            ValueError: another rank has failed, or has taken other weights.
        """
        ranks, total = self._ranks, self._measured.total
        update = self._combine(weights[..., self._measured.own], groups)
        parts = [leaf.flatten().to(ranks.update_dtype) for leaf in tree_leaves(update)]
        if total is not None:
            flat = torch.cat(parts)
            with torch.no_grad():  # like a message: the graph stays that of this rank's own sum
                flat.copy_(weights.amax() * total)
            ranks.owing = False
        elif ranks.shards:  # reports go to all ranks, numbers to those with the same part
            flat = torch.cat(parts)
            ranks.send([flat[:0]], weights)
            ranks.shards.add_up(flat)
        else:
            flat = ranks.send(parts, weights)
        totals = torch.split(flat, [shape.numel() for shape, _ in ranks.layout])
        leaves = []
        for total, (shape, dtype) in zip(totals, ranks.layout, strict=True):
            dtype = torch.promote_types(dtype, torch.float32) if self._wide else dtype
            leaves.append(total.reshape(shape).to(dtype))
        return like(update, leaves)

    def and_norm(self, weights: Tensor, measured: Measured, /) -> tuple[PyTree, Tensor]:
        """The update, and its norm over all parts of it."""
        update = self(weights, measured.groups)
        shards = self._ranks.shards
        counted = shards.counted([leaf.unsqueeze(0) for leaf in leaves_of(update)])
        return update, shards.norm(counted)
