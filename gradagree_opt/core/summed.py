"""Apply over ranks: Σ_i w_i · direction_i of all tasks from each rank's own, and its norm."""

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradagree_opt.core.combination import Combination
from gradagree_opt.core.results import Combine, Measured
from gradagree_opt.core.stacks import PyTree, accumulation_dtype, leaves_of, like

if TYPE_CHECKING:
    from gradagree_opt.core.ranks import Ranks


class Summed:
    """Σ_i w_i · direction_i over the tasks of all ranks as a function of the weights."""

    def __init__(self, ranks: "Ranks", combine_directions: Combine, own: slice) -> None:
        self._ranks = ranks
        self._directions = combine_directions
        self._own = own

    def __call__(self, weights: Tensor, groups: list[int] | None, /) -> PyTree:
        """The update, as far as this rank holds it.

        Raises:
            ValueError: another rank has failed, or has directions of other shapes.
        """
        own, ranks = self._directions, self._ranks
        stack = own if isinstance(own, Combination) else None
        # One rank's part may be larger than its dtype can hold.
        combine = own if stack is None else stack.wide
        update, error = (), None
        try:
            update = combine(weights[..., self._own], groups)
        except Exception as raised:
            error = raised
        leaves = tree_leaves(update)
        kept = leaves if stack is None else leaves_of(stack.stack)
        pairs = [*zip(leaves, kept, strict=True)]
        shapes = [(tuple(leaf.shape), str(each.dtype)) for leaf, each in pairs]
        digests = ranks.agree(error, zlib.crc32(str(shapes).encode()))
        wanted = dict(zip(reversed(ranks.indices), reversed(digests), strict=True))
        places = zip(ranks.indices, digests, strict=True)
        others = [rank for rank, (at, digest) in enumerate(places) if digest != wanted[at]]
        if others:
            raise ValueError(
                "expected directions alike on all ranks, found other shapes on rank "
                f"{others[0]} than on rank {ranks.indices.index(ranks.indices[others[0]])}; "
                "build model and tasks alike on every rank"
            )
        flat = torch.cat([leaf.flatten().to(accumulation_dtype(leaves)) for leaf in leaves])
        ranks.shards.add_up(flat)
        totals = torch.split(flat, [leaf.numel() for leaf in leaves])
        shaped = [
            total.reshape(leaf.shape).to(each.dtype)
            for total, (leaf, each) in zip(totals, pairs, strict=True)
        ]
        return like(update, shaped)

    def and_norm(self, weights: Tensor, measured: Measured, /) -> tuple[PyTree, Tensor]:
        """The update, and its norm over all parts of it."""
        update = self(weights, measured.groups)
        return update, self._ranks.shards.norm([leaf.unsqueeze(0) for leaf in leaves_of(update)])
