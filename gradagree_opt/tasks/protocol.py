"""What every task distribution offers: task-stacked tasks from a seeded generator."""

from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from gradagree_opt.options import check_choice

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Batch = tuple[Tensor, Tensor]
"""Inputs ``[n, examples, ...]`` and targets ``[n, examples, ...]``, the task axis first."""


@runtime_checkable
class TaskDistribution(Protocol):
    """Anything meta-learning tasks can be drawn from.

    All randomness comes from ``generator``: the same distribution and the same generator state give
    the same tasks, and PyTorch's global generator is neither read nor advanced.
    """

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        """Draw tasks.

        Args:
            n_tasks: number of tasks, at least 1.
            split: which part of the distribution; the parts share no task.
            generator: the only source of randomness, advanced by the call.

        Returns:
            ``{"support": (x, y), "query": (x, y)}``, every tensor with the task axis first.
        """


def check_options(dtype: torch.dtype, /, **counts: int) -> None:
    """Say in one sentence that tensors of this dtype, or as few of them, cannot be sampled.

    Raises:
        TypeError: ``dtype`` is not a floating one.
        ValueError: one of the counts is below 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"expected {name} to be at least 1, found {count}")
    if not dtype.is_floating_point:
        raise TypeError(f"expected a floating dtype, found {dtype}")


def check_split_numbers(splits: Tensor, /) -> None:
    """Raises a ValueError where one is no number of a split."""
    unknown = splits[(splits < 0) | (splits >= len(SPLITS))]
    if len(unknown):
        raise ValueError(
            "expected split numbers 0 (train), 1 (validation) or 2 (test), "
            f"found {unknown[0].item()}"
        )


def check_sample_arguments(n_tasks: object, split: object, generator: object, /) -> None:
    """Say in one sentence what is wrong with the arguments of ``sample``.

    Raises:
        TypeError: ``n_tasks`` is not an integer or ``generator`` not a ``torch.Generator``.
        ValueError: ``n_tasks`` is below 1 or ``split`` is none of the three.
    """
    if not isinstance(n_tasks, int) or isinstance(n_tasks, bool):
        raise TypeError(f"expected n_tasks to be an int, found {n_tasks!r}")
    if n_tasks < 1:
        raise ValueError(f"expected n_tasks to be at least 1, found {n_tasks}")
    check_choice("split", split, SPLITS)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"expected generator to be a seeded torch.Generator, found {generator!r}: "
            "pass torch.Generator().manual_seed(seed)"
        )
