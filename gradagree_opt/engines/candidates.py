"""The engines, one line each, and which of them suit an aggregation."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.stacks import is_coarse
from gradagree_opt.engines.losses import TaskLoss
from gradagree_opt.engines.matrix_free import matrix_free, matrix_free_refusal
from gradagree_opt.engines.one_backward import one_backward, one_backward_refusal
from gradagree_opt.engines.stacked import stacked
from gradagree_opt.engines.streamed import streamed, streamed_refusal

EngineName = Literal["auto", "stacked", "streamed", "matrix_free", "one_backward"]

STACK_BYTES = 2**24
"""If all gradients together are larger than this, it is also faster not to hold them."""
GPU_STACK_BYTES = 2**30
"""The same on a GPU, roughly: at 0.7 GiB, holding them took 0.6 of the time."""


class Engine(NamedTuple):
    """One way from a task loss, parameters, tasks and an aggregator to the aggregation.

    Attributes:
        run: gives the aggregation and the losses ``[n]``.
        refusal: why it cannot serve an aggregator and a task loss, in half a sentence, or None.
        in_float32: whether it adds over the tasks in float32 whatever the parameters are.
    """

    run: Callable[..., tuple[Aggregation, Tensor]]
    refusal: Callable[[Aggregator, TaskLoss], str | None]
    in_float32: bool


ENGINES = {
    "stacked": Engine(stacked, lambda *_: None, in_float32=True),
    "streamed": Engine(streamed, streamed_refusal, in_float32=True),
    "matrix_free": Engine(matrix_free, matrix_free_refusal, in_float32=False),
    "one_backward": Engine(one_backward, one_backward_refusal, in_float32=False),
}


def candidates(
    engine: EngineName,
    task_loss: TaskLoss,
    leaves: Sequence[Tensor],
    n: int,
    aggregator: Aggregator,
    /,
    *,
    loops: bool,
) -> list[str]:
    """Names of the engines to try, the best first.

    Args:
        engine: the one that was asked for, or "auto".
        task_loss: what gradients are taken of.
        leaves: the parameters.
        n: number of tasks.
        aggregator: what weights the tasks.
        loops: whether "auto" may take one that loops over the tasks.

    Raises:
        ValueError: the engine that was asked for cannot serve the aggregator.
    """
    if engine != "auto":
        refusal = ENGINES[engine].refusal(aggregator, task_loss)
        if refusal is not None:
            raise ValueError(
                f"expected an aggregator that engine={engine!r} can serve, found that {refusal}; "
                "take engine='stacked'"
            )
        return [engine]
    order = ["one_backward", "stacked"]
    if aggregator.scope != "global":  # one backward pass for each group
        order.reverse()
    if not task_loss.adapts and are_large(leaves, n):
        order.insert(0, "matrix_free")
    if loops:
        order.append("streamed")
    if is_coarse(leaves):
        order = [name for name in order if ENGINES[name].in_float32]
    return [name for name in order if ENGINES[name].refusal(aggregator, task_loss) is None]


def are_large(leaves: Sequence[Tensor], n: int, /) -> bool:
    """Whether the gradients of n tasks are so large that it is faster not to hold them."""
    size: int = n * sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    limit = STACK_BYTES if leaves[0].device.type == "cpu" else GPU_STACK_BYTES
    return size > limit
