"""What torch says of a model that it cannot run over many tasks at once, as one sentence."""

import math
import re

import torch


class SharedDrawsError(RuntimeError):
    """vmap has drawn once for tasks that are to draw for themselves."""


def explained(error: RuntimeError, by: str, advice: str, /) -> RuntimeError:
    """The error in one sentence that says what to do.

    Args:
        error: as torch raised it.
        by: what ran the model.
        advice: what runs it in another way.

    >>> explained(RuntimeError("no rule. See there"), "vmap", "chunk_size=1")
    RuntimeError('expected a model that vmap can run, found: no rule; take chunk_size=1')
    """
    found = _first_sentence(error)
    return RuntimeError(f"expected a model that {by} can run, found: {found}; take {advice}")


def without_memory(error: RuntimeError, by: str, n: int, /, *, without: str) -> RuntimeError:
    """The error of n tasks at once that do not fit into memory, in one sentence."""
    fewer = f"chunk_size={math.isqrt(n)}, or " if n > 1 else ""
    kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
    return kind(
        f"expected {n} tasks at once to fit into memory under {by}, found: "
        f"{_first_sentence(error)}; give {fewer}{without}"
    )


def is_out_of_memory(error: RuntimeError, /) -> bool:
    """Whether it is for lack of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_ours(error: Exception, /) -> bool:
    """Whether it is a sentence of this library, which says what it expected and what it found."""
    return str(error).startswith("expected ") and " found" in str(error)


def _first_sentence(error: RuntimeError) -> str:
    first = re.split(r"(?<!:)\n|(?<=\.)\s", str(error), maxsplit=1)[0]
    return first.rstrip(".").replace("\n", " ")
