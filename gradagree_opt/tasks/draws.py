"""The random draws torch lacks: many ordered subsets at once, and examples in random order."""

import torch

from gradagree_opt.annotations import Bool, Int


def random_subsets(
    rows: tuple[int, ...],
    items: int,
    size: int,
    generator: torch.Generator,
    allowed: Bool[torch.Tensor, "*rows items"] | None = None,
) -> Int[torch.Tensor, "*rows size"]:
    """For every row, ``size`` distinct numbers of ``0 … items - 1`` in random order.

    Where ``allowed`` is given, a row draws from its allowed items alone, at least ``size`` of them.
    Sorting uniform draws does what ``torch.randperm`` does for one row, for all rows in one call.

    >>> subsets = random_subsets((3, 2), 10, 4, torch.Generator().manual_seed(0))
    >>> subsets.shape, len(set(subsets[0, 0].tolist()))
    (torch.Size([3, 2, 4]), 4)
    """
    draws = torch.rand((*rows, items), generator=generator, device=generator.device)
    if allowed is not None:
        draws.masked_fill_(~allowed.to(draws.device), -1.0)
    return draws.topk(size).indices


def in_random_order(
    rows: Int[torch.Tensor, "n way shots"], generator: torch.Generator
) -> tuple[Int[torch.Tensor, "n examples"], Int[torch.Tensor, "n examples"]]:
    """The rows of each task's classes mixed, and for each the number of its class.

    >>> rows = torch.arange(6).view(1, 3, 2)
    >>> mixed, classes = in_random_order(rows, torch.Generator().manual_seed(0))
    >>> torch.equal(mixed // 2, classes)
    True
    """
    n_tasks, way, shots = rows.shape
    order = random_subsets((n_tasks,), way * shots, way * shots, generator).to(rows.device)
    return rows.flatten(1).gather(1, order), order // shots
