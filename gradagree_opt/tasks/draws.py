"""The one random draw torch lacks: many ordered subsets at once, from a generator."""

import torch

from gradagree_opt.annotations import Int


def random_subsets(
    rows: tuple[int, ...], items: int, size: int, generator: torch.Generator
) -> Int[torch.Tensor, "*rows size"]:
    """For every row, ``size`` distinct numbers of ``0 … items - 1`` in random order.

    Sorting uniform draws does what ``torch.randperm`` does for one row, for all rows in one call.

    >>> subsets = random_subsets((3, 2), 10, 4, torch.Generator().manual_seed(0))
    >>> subsets.shape, len(set(subsets[0, 0].tolist()))
    (torch.Size([3, 2, 4]), 4)
    """
    draws = torch.rand((*rows, items), generator=generator, device=generator.device)
    return draws.topk(size).indices
