"""What a loop over tasks tells the other ranks: what its tasks use, and a task that has failed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from gradagree_opt.core.aggregation import Aggregator


@contextmanager
def task_of(batch: object, aggregator: Aggregator, /) -> Iterator[None]:
    """Around one task, outside of any step: where it fails, no other step may take its place."""
    try:
        yield
    except Exception:
        if aggregator.ranks is not None:
            aggregator.ranks.left = batch
        raise


def used_on_any_rank(
    aggregator: Aggregator, parameters: Mapping[str, Tensor], used: set[str], /
) -> dict[str, Tensor]:
    """Those of the parameters that a task uses, of any rank's.

    Args:
        aggregator: of one process or of several ranks.
        parameters: all that are trained, in the same order on every rank.
        used: names of those that this rank's tasks use.
    """
    flags = [name in used for name in parameters]
    if aggregator.ranks is not None:
        device = next(iter(parameters.values())).device
        flags = aggregator.ranks.used_by_any(flags, device)
    return {name: p for (name, p), flag in zip(parameters.items(), flags, strict=True) if flag}
