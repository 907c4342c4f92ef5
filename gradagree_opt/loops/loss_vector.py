"""A vector of task losses, and its checks."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.loops.graphs import check_loss

Losses = Float[Tensor, " n"] | Sequence[Tensor]


def loss_vector(losses: Losses, /, *, least: int = 1) -> list[Tensor]:
    """The losses of n tasks, each checked.

    Args:
        losses: ``[n]`` tensor, or iterable of n scalars.
        least: how many there have to be.

    Raises:
        TypeError, ValueError: they are no vector, fewer, or one is no real scalar with a graph.
    """
    if isinstance(losses, Tensor) and losses.ndim != 1:
        raise ValueError(
            f"expected a vector of task losses [n], found shape {list(losses.shape)}; "
            "give one loss a task, not their mean"
        )
    if isinstance(losses, Mapping):
        raise TypeError(
            f"expected a sequence of task losses, found {type(losses).__name__}; give "
            "list(losses.values())"
        )
    if not isinstance(losses, Iterable):
        raise TypeError(
            f"expected the task losses [n], found {type(losses).__name__}; compute them before the "
            "step, and give them in place of a closure"
        )
    each = list(losses.unbind()) if isinstance(losses, Tensor) else list(losses)
    if len(each) < least:
        raise ValueError(
            "expected at least one task, found no losses; skip the step when there are no tasks"
        )
    for task, loss in enumerate(each):
        check_loss(loss, task)
    return each
