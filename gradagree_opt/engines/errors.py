"""What torch says of a model that it cannot run over many tasks at once, as one sentence."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SharedDrawsError(RuntimeError):
    """vmap has drawn once for tasks that are to draw for themselves."""


def explained(error: RuntimeError, by: str, n: int, /, *, without: str) -> RuntimeError:
    """The error in one sentence that says what to do.

    Args:
        error: as torch raised it.
        by: what ran the model.
        n: tasks that it ran at once.
        without: what runs the model in another way.
    """
    found = _first_sentence(error)
    if is_out_of_memory(error):
        fewer = f"chunk_size={math.isqrt(n)}, or " if n > 1 else ""
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
        return kind(
            f"expected {n} tasks at once to fit into memory under {by}, found: {found}; give "
            f"{fewer}{without}"
        )
    advice = without
    compiled = "compile" in without
    if isinstance(error, SharedDrawsError) and not compiled:
        advice = "chunk_size=1, where every task draws for itself, or randomness='same'"
    elif is_vmaps(error) and not compiled and not isinstance(error, SharedDrawsError):
        advice = "chunk_size=1, which does without vmap"
        if "randomness" in found:
            advice = "randomness='different', or 'same' for one draw for all tasks"
    return RuntimeError(f"expected a model that {by} can run, found: {found}; take {advice}")


def is_out_of_memory(error: RuntimeError, /) -> bool:
    """Whether it is for lack of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_vmaps(error: RuntimeError, /) -> bool:
    """Whether it is about vmap, and not about what the model does under it."""
    if isinstance(error, SharedDrawsError):
        return True
    found = _first_sentence(error)
    return "vmap" in found or "Batching rule" in found


def _first_sentence(error: RuntimeError) -> str:
    first = re.split(r"(?<!:)\n|(?<=\.)\s", str(error), maxsplit=1)[0]
    return first.rstrip(".").replace("\n", " ")


@contextmanager
def vmap_explained(by: str, n: int, /, *, without: str) -> Iterator[None]:
    """:func:`explained` for what torch raises in the block about vmap or memory."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or is_vmaps(error):
            raise explained(error, by, n, without=without) from error
        raise
