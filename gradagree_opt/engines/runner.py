"""Which engine runs: the one that was asked for, or the first of those that suit that can."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gradagree_opt.aggregation import Aggregation, Aggregator
from gradagree_opt.aggregators import check_aggregator
from gradagree_opt.annotations import Float
from gradagree_opt.engines.compilation import maybe_compiled
from gradagree_opt.engines.errors import explained, is_out_of_memory
from gradagree_opt.engines.losses import TaskLoss
from gradagree_opt.engines.matrix_free import matrix_free, matrix_free_refusal
from gradagree_opt.engines.one_backward import one_backward, one_backward_refusal
from gradagree_opt.engines.stacked import stacked
from gradagree_opt.engines.streamed import streamed, streamed_refusal
from gradagree_opt.stacks import PyTree, is_coarse, task_count
from gradagree_opt.weightings import check_choice

EngineName = Literal["auto", "stacked", "streamed", "matrix_free", "one_backward"]

Engine = Callable[..., tuple[Aggregation, Tensor]]

ENGINES: dict[str, Engine] = {
    "stacked": stacked,
    "streamed": streamed,
    "matrix_free": matrix_free,
    "one_backward": one_backward,
}

STACK_BYTES = 2**24
GPU_STACK_BYTES = 2**30
"""Size of all gradients together from which on not to hold them is faster as well.

On a GPU it takes more of them until arithmetic takes longer than to launch it.
"""


class Run(NamedTuple):
    """The aggregation of a batch, the losses of its tasks, and the engine that ran."""

    aggregation: Aggregation
    losses: Float[Tensor, " n"]
    engine: str


class Runner:
    """Runs batches of one task loss by the engine asked for, compiled once where asked for.

    Args:
        task_loss: loss and signal of one task.
        engine: "auto" takes the first engine that suits the aggregator and the size of the stack
            of gradients, and from then on the next one where the model cannot be run by it.
        compile: torch.compile every engine but "streamed", which is a loop and not taken then.

    Raises:
        ValueError: the engine is none of its choices, or cannot be compiled.
    """

    def __init__(self, task_loss: TaskLoss, engine: EngineName, compile: bool) -> None:
        check_choice("engine", engine, ("auto", *ENGINES))
        if compile and engine == "streamed":
            raise ValueError(
                "expected an engine that torch.compile takes whole, found 'streamed', a loop over "
                "the tasks; give compile=False or engine='stacked'"
            )
        self.task_loss = task_loss
        self.engine = engine
        self._compile = compile
        self._failed: set[str] = set()
        self._engines = {
            name: maybe_compiled(
                partial(_constants, function, task_loss), compile and name != "streamed"
            )
            for name, function in ENGINES.items()
        }

    def __call__(self, params: PyTree, tasks: PyTree, n: int, aggregator: Aggregator, /) -> Run:
        """The aggregation of one batch of n tasks, looked at by :meth:`Aggregator.verify`.

        Raises:
            ValueError: the aggregator refuses the tasks, or the engine the aggregator.
            RuntimeError: the engine cannot run the model, or memory does not suffice.
        """
        check_aggregator(aggregator)
        draws = aggregator.draw(n)
        failed: set[str] = set()
        *others, last = self._candidates(params, n, aggregator)
        for name in others:
            try:
                run = self._run(name, params, tasks, aggregator, draws)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    failed.add(name)
            else:
                break
        else:
            try:
                run = self._run(last, params, tasks, aggregator, draws)
            except RuntimeError as error:
                if last == "streamed":
                    raise
                without = "compile=False" if self._compile else "engine='streamed'"
                raise explained(error, f"engine={last!r}", n, without=without) from error
        self._failed |= failed
        return run

    def unchecked(
        self, params: PyTree, tasks: PyTree, aggregator: Aggregator, draws: Tensor | None, /
    ) -> Aggregation:
        """The aggregation by the engine that suits best, not looked at and with no other tried."""
        name = self._candidates(params, task_count(tasks, "tasks"), aggregator)[0]
        aggregation, _ = self._engines[name](params, tasks, aggregator, draws)
        return aggregation

    def _run(
        self,
        name: str,
        params: PyTree,
        tasks: PyTree,
        aggregator: Aggregator,
        draws: Tensor | None,
    ) -> Run:
        aggregation, losses = self._engines[name](params, tasks, aggregator, draws)
        aggregator.verify(aggregation)
        return Run(aggregation, losses, name)

    def _candidates(self, params: PyTree, n: int, aggregator: Aggregator) -> list[str]:
        """The engines to try, the best first."""
        refusals = {
            "stacked": None,
            "streamed": streamed_refusal(aggregator, self.task_loss),
            "matrix_free": matrix_free_refusal(aggregator, self.task_loss),
            "one_backward": one_backward_refusal(aggregator, self.task_loss),
        }
        if self.engine != "auto":
            if refusals[self.engine] is not None:
                raise ValueError(
                    f"expected an aggregator that engine={self.engine!r} can serve, found that "
                    f"{refusals[self.engine]}; take engine='stacked'"
                )
            return [self.engine]
        sparing = not self.task_loss.adapts and _is_better_not_held(params, n)
        by_group = ["one_backward", *["matrix_free"] * sparing]  # a backward pass for each group
        order = [*by_group, "stacked"] if aggregator.scope == "global" else ["stacked", *by_group]
        order += [] if self._compile else ["streamed"]
        order = [name for name in order if refusals[name] is None]
        return [name for name in order if name not in self._failed] or order


def _is_better_not_held(params: PyTree, n: int) -> bool:
    """Whether the gradients of n tasks are many, and their row sums as good without them."""
    leaves = tree_leaves(params)
    size = n * sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    limit = STACK_BYTES if leaves[0].device.type == "cpu" else GPU_STACK_BYTES
    return size > limit and not is_coarse(leaves)


def _constants(
    engine: Engine, task_loss: TaskLoss, params: PyTree, *others: Any
) -> tuple[Aggregation, Tensor]:
    """What an engine answers, without a graph, whatever requires a gradient."""
    answer = engine(task_loss, tree_map(torch.Tensor.detach, params), *others)
    result: tuple[Aggregation, Tensor] = tree_map(torch.Tensor.detach, answer)
    return result
