"""The streamed engine: one task's gradient at a time, by first-order autograd alone."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.shards import of_no_task
from gradagree_opt.core.stacks import PyTree, accumulation_dtype, task_count
from gradagree_opt.core.transforms import in_transform
from gradagree_opt.engines.kept import Model
from gradagree_opt.engines.losses import TaskLoss, refuse_independent
from gradagree_opt.engines.one_at_a_time import measured_in_two_passes, weighted_sum
from gradagree_opt.engines.random_state import RandomState, check_same_losses
from gradagree_opt.engines.recomputed import from_these, nodes_of, refuse_reentrant
from gradagree_opt.engines.rows import Rows


def streamed_refusal(aggregator: Aggregator, task_loss: TaskLoss, /) -> str | None:
    """Why the engine cannot serve an aggregator, in half a sentence; None where it can."""
    known = {"draws", "squared_norms", "cosine_row_sums", "other_row_sums"}
    if not task_loss.signal_is_gradient:
        known |= {"relative_norms", "cosines", "gramian"}  # of a stack that is held
    missing = sorted(aggregator.needs - known)
    if missing:
        return f"its weighting reads {', '.join(missing)}, which needs all gradients at once"
    if aggregator.ranks is not None and task_loss.signal_is_gradient:
        return "its passes sum the gradients of one rank's tasks alone"
    if aggregator.nonfinite == "drop" and not task_loss.signal_is_gradient:
        return "nonfinite='drop' needs the gradients of all tasks before the first is weighted"
    return None


def streamed(
    task_loss: TaskLoss,
    params: PyTree,
    tasks: PyTree,
    aggregator: Aggregator,
    /,
) -> tuple[Aggregation, Float[Tensor, " n"]]:
    """Aggregation of n gradients of which one exists at a time, and the losses: d extra memory.

    Three backward passes a task, for Σ g_j, for every g_i · Σ_j g_j and for Σ w_i g_i: the weights
    are known only when all scores are. Where the signal is known from the forward pass, its stack
    is held, and one backward pass a task is enough.

    Raises:
        ValueError: autograd cannot be switched on, or cannot differentiate here; the losses depend
            on no parameter, or another pass finds other ones.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "expected a mode in which autograd can be switched on, found torch.inference_mode(); "
            "take torch.no_grad(), or no such block"
        )
    if in_transform():
        raise ValueError(
            "expected a call outside of the transforms of torch.func, found one within, where "
            "autograd alone cannot differentiate; take engine='stacked'"
        )
    stream = _Stream(task_loss, params, tasks)
    try:
        if task_loss.signal_is_gradient:
            measured, losses = measured_in_two_passes(stream, aggregator)
        else:
            losses, signal = stream.losses_and_signals()
            measured = aggregator.measure(
                signal, directions=of_no_task(params), nonfinite=~torch.isfinite(losses)
            )
        aggregation = aggregator.apply(measured, partial(weighted_sum, stream))
    finally:
        stream.model.restore_parameters()
    return aggregation, losses


class _Stream:
    """The gradients of the tasks, each pass of the same random numbers and buffers."""

    def __init__(self, task_loss: TaskLoss, params: PyTree, tasks: PyTree) -> None:
        self.params = params
        self._task_loss = task_loss
        self._tasks = tasks
        self.n = task_count(tasks, "tasks")
        self._random_state = RandomState(params, tasks, source=task_loss.map.source)
        self.model = Model(task_loss.map.source)
        self._losses: Tensor | None = None
        # A tensor of inference mode cannot require a gradient.
        self._leaves = [
            (leaf.clone() if leaf.is_inference() else leaf.detach()).requires_grad_()
            for leaf in tree_leaves(params)
        ]
        self._dtype = accumulation_dtype(self._leaves)

    def losses_and_signals(self) -> tuple[Tensor, PyTree]:
        """Losses ``[n]`` and the stack of the signals, without a backward pass."""
        with torch.no_grad():
            known = [self._task_loss.function(self.params, task)[1] for task in self._each()]
        signals, losses = tree_map(lambda *leaves: torch.stack(leaves), *known)
        self._compare(losses)
        return losses, signals

    def gradients(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Loss of every task and the leaves of its gradient, in float32 or better."""
        at = tree_unflatten(self._leaves, tree_structure(self.params))
        losses = Rows(self.n)
        self._depends = False
        for task in self._each():
            with torch.enable_grad():
                loss, _ = self._task_loss.function(at, task)
            losses.append(loss.detach().unsqueeze(0))
            # Held by no name here, so that it is gone when the next one is made.
            yield loss.detach(), self._gradient(loss)
        if not self._depends:
            refuse_independent()
        self._compare(losses.stack)

    def _gradient(self, loss: Tensor) -> list[Tensor]:
        """Zeros where the loss depends on no parameter; notes whether that of any task does."""
        found: Sequence[Tensor | None] = [None] * len(self._leaves)
        if loss.requires_grad:
            with from_these(self._leaves, self.model.modules, loss):
                found = torch.autograd.grad(loss, self._leaves, allow_unused=True)
            if any(each is None for each in found):
                refuse_reentrant(nodes_of(loss))
        self._depends = self._depends or any(each is not None for each in found)
        return [
            torch.zeros_like(leaf, dtype=self._dtype).detach()
            if each is None
            else each.to_dense().to(self._dtype)
            for each, leaf in zip(found, self._leaves, strict=True)
        ]

    def _compare(self, losses: Tensor) -> None:
        """One host synchronisation: raises where a pass has other losses than the first one."""
        if self._losses is None:
            self._losses = losses
        else:
            check_same_losses(self._losses, losses)

    def _each(self) -> Iterator[PyTree]:
        self._random_state.restore()
        self.model.restore()
        return self._task_loss.map.one_by_one(self.params, self._tasks, self.n)
