"""What torch says of a model that it cannot run over many tasks at once, as one sentence."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def explained(error: RuntimeError, by: str, n: int, /, *, without: str) -> RuntimeError:
    """The error in one sentence that says what to do.

    Args:
        error: as torch raised it.
        by: what ran the model.
        n: tasks that it ran at once.
        without: what runs the model in another way.
    """
    found = (
        re.split(r"(?<!:)\n|(?<=\.)\s", str(error), maxsplit=1)[0].rstrip(".").replace("\n", " ")
    )
    if is_out_of_memory(error):
        return RuntimeError(
            f"expected {n} tasks at once to fit into memory under {by}, found: {found}; give "
            f"chunk_size={math.isqrt(n)}, or {without}"
        )
    vmapped = "vmap" in found or "Batching rule" in found
    advice = "chunk_size=1, which does without vmap" if vmapped else without
    return RuntimeError(f"expected a model that {by} can run, found: {found}; take {advice}")


def is_out_of_memory(error: RuntimeError, /) -> bool:
    """Whether it is for lack of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def in_one_sentence(by: str, n: int, /, *, without: str) -> Iterator[None]:
    """:func:`explained` for whatever torch raises inside the block."""
    try:
        yield
    except RuntimeError as error:
        raise explained(error, by, n, without=without) from error
