"""Lightning 2: accumulated training steps as tasks, and a task batch for manual optimization."""

from typing import Literal

import torch
from gradagree_opt.adapters.lightning_trainer import (
    accumulates,
    check_trainer,
    closes_window,
    is_a,
    loss_scale,
    named,
    scaler_of,
    trained,
)
from torch import Tensor, nn

from gradagree_opt.annotations import Float
from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.diagnostics import Diagnostics, check_some_task
from gradagree_opt.core.header import TaskForm
from gradagree_opt.core.results import CollectedTasks
from gradagree_opt.frameworks import require
from gradagree_opt.loops.accumulation import check_no_accumulation_hooks
from gradagree_opt.loops.adapted import Parameters
from gradagree_opt.loops.graphs import check_depends
from gradagree_opt.loops.over_ranks import Used
from gradagree_opt.loops.task_batch import TaskBatch
from gradagree_opt.one_process import check_no_static_graph

require("lightning")

import lightning.pytorch as pl  # noqa: E402 - after require, whose error names the install command

__all__ = ["AgreementCallback", "ManualTaskBatch"]


class AgreementCallback(pl.Callback):
    """Automatic optimization: the N steps of ``accumulate_grad_batches=N`` are N tasks.

    The gradient of every training step is set aside; after the last of a window their aggregation
    stands in ``.grad``, before loss scales are undone, gradients clipped and the optimizer stepped.
    A window that the end of the epoch cuts short is aggregated over the tasks that it has. The
    diagnostics are logged through the module as ``agreement/…``. Under ``strategy="ddp"`` with
    ``ga.distributed`` the N steps of every rank are the tasks.

    Args:
        aggregator: what weights the tasks; signal and direction are both the loss gradient.

    Attributes:
        weights: of the tasks of the last window, ``[n]``; None before the first.

    Raises:
        TypeError: ``aggregator`` is no aggregator.
        ValueError: when ``Trainer.fit`` starts, for ``accumulate_grad_batches=1``, manual
            optimization, several devices but by ``strategy="ddp"`` and ``ga.distributed``, another
            such callback, or a GradScaler with an aggregator that stops at its overflows; at a
            loss of no parameter, or hooks on .grad.

    Source: Eshratifar et al. 2018, algorithm 1, without an inner loop.

    >>> import gradagree_opt as ga
    >>> trainer = pl.Trainer(
    ...     accumulate_grad_batches=4, callbacks=[AgreementCallback(ga.GradientAgreement())],
    ...     accelerator="cpu", logger=False, enable_checkpointing=False,
    ...     enable_progress_bar=False, enable_model_summary=False,
    ... )
    """

    def __init__(self, aggregator: Aggregator, /) -> None:
        check_aggregator(aggregator)
        self.aggregator = aggregator
        self.weights: Float[Tensor, "*groups n"] | None = None
        self._tasks: list[dict[str, Tensor]] = []
        self._window_closed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "expected automatic optimization, found automatic_optimization=False; "
                "use ManualTaskBatch in training_step"
            )
        if not accumulates(trainer):
            raise ValueError(
                "expected accumulate_grad_batches=N with N tasks a step, found 1; pass "
                "Trainer(accumulate_grad_batches=N), or take ManualTaskBatch for several losses of "
                "one training step"
            )
        check_trainer(trainer, self.aggregator)
        n = sum(isinstance(each, AgreementCallback) for each in trainer.callbacks)  # type: ignore[attr-defined]
        if n > 1:
            raise ValueError(
                f"expected one AgreementCallback, found {n}, of which one would aggregate what the "
                "other has; give the Trainer one"
            )
        self._forget()

    def on_train_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002 - Lightning's signature, here and below
    ) -> None:
        model = trainer.strategy.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            check_no_static_graph(model)
            # The Trainer's own wrapper, of this fit alone: no window's last step is averaged.
            model.require_backward_grad_sync = False

    def on_before_zero_grad(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        optimizer: torch.optim.Optimizer,  # noqa: ARG002
    ) -> None:
        self._forget()

    def on_before_backward(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        loss: Tensor,
    ) -> None:
        check_depends(loss, trained(trainer), len(self._tasks), advice="compute it by the module")
        for parameter in trained(trainer):
            check_no_accumulation_hooks(parameter, advice="use ManualTaskBatch")
            parameter.grad = None

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._window_closed:
            raise ValueError(
                "expected one backward pass a training step, found a second one in the last step "
                f"of a window; {type(trainer.optimizers[0]).__name__} calls its closure again, "
                "take an optimizer that does not"
            )
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in named(trainer, pl_module).items()
            if parameter.grad is not None
        }
        self._tasks.append(gradients)
        if closes_window(trainer):
            self._aggregate(trainer, pl_module)
            self._window_closed = True

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,  # noqa: ARG002
    ) -> None:
        # Only if the last training_step of the window returned None, so that no backward closed it.
        if self._tasks:
            self._aggregate(trainer, pl_module)

    def _aggregate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scale = loss_scale(trainer)
        parameters = named(trainer, pl_module)
        with self.aggregator.step_of_ranks(form=TaskForm.LOSSES):
            # Lightning has divided the loss by N, and a GradScaler has multiplied it.
            names = [set(task) for task in self._tasks]
            stack = self._stack(parameters, names, trainer.accumulate_grad_batches / scale)
            used = Used(self.aggregator, parameters, names)
            used.look_at(stack)
            result = self.aggregator.aggregate(stack)
            check_some_task(result.diagnostics, self.aggregator.nonfinite)
        there = used.by_any(result.diagnostics)
        for name, parameter in parameters.items():
            parameter.grad = result.update[name] * scale if name in there else None
        self.weights, self._tasks = result.weights, []
        _log(pl_module, "agreement", result.diagnostics)
        model = trainer.strategy.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_forward_param_sync = True  # buffers are sent once a step, as without us

    def _stack(
        self, parameters: dict[str, nn.Parameter], used: list[set[str]], factor: float
    ) -> dict[str, Tensor]:
        """The gradients of the window; of all parameters where another rank may use them."""
        needed = set(parameters) if self.aggregator.ranks is not None else set().union(*used)
        return {
            name: torch.stack([_take(task, name, p) for task in self._tasks]).mul_(factor)
            for name, p in parameters.items()
            if name in needed
        }

    def _forget(self) -> None:
        self._tasks = []
        self._window_closed = False


class ManualTaskBatch(TaskBatch):
    """Manual optimization: a :class:`TaskBatch` in ``training_step``, for ``manual_backward``.

    Losses go through the precision plugin and the hooks around a backward pass
    (``on_before_backward`` for each, ``on_after_backward`` once), so that ``clip_gradients`` and
    ``optimizer.step()`` find in ``.grad`` what ``manual_backward`` would leave there. An overridden
    ``LightningModule.backward`` is not called. The diagnostics are logged.

    Args:
        module: the module, inside its ``training_step``.
        aggregator: what weights the tasks.
        parameters: the part of the module that this batch is to train; all of it if None. With
            several optimizers, those of one.
        memory: as in :class:`TaskBatch`.
        name: under which the diagnostics are logged, as in ``agreement/weight_sum``.

    Raises:
        TypeError: it is no LightningModule.
        ValueError: automatic optimization, several devices but by ``strategy="ddp"`` and
            ``ga.distributed``, or a GradScaler with an aggregator that stops at its overflows.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        aggregator: Aggregator,
        /,
        *,
        parameters: Parameters | None = None,
        memory: Literal["graph", "stream"] = "graph",
        name: str = "agreement",
    ) -> None:
        if not is_a("LightningModule", module):
            raise TypeError(
                f"expected a LightningModule, found {type(module).__name__}; give self, and a part "
                "of it as parameters="
            )
        if module.automatic_optimization:
            raise ValueError(
                "expected manual optimization, found automatic_optimization=True; set it to False "
                "in __init__, or take AgreementCallback"
            )
        check_trainer(module.trainer, aggregator)
        super().__init__(module if parameters is None else parameters, aggregator, memory=memory)
        self._module = module
        self._name = name
        self._total: Tensor | None = None

    def add(self, loss: Tensor | None = None, /, *, adapted: Parameters | None = None) -> None:
        """As :meth:`TaskBatch.add`; the loss is scaled where the precision plugin scales.

        Raises:
            ValueError: as there, or no loss under a GradScaler.
        """
        trainer = self._module.trainer
        if loss is not None:
            loss = trainer.precision_plugin.pre_backward(loss, self._module)
        elif scaler_of(trainer) is not None:
            raise ValueError(
                "expected a loss under a GradScaler, which has nothing to scale in the Reptile "
                "form; train with precision='bf16-mixed' or '32-true'"
            )
        super().add(loss, adapted=adapted)
        if loss is not None:
            self._total = loss.detach() + (0 if self._total is None else self._total)

    def backward(self) -> CollectedTasks:
        """As :meth:`TaskBatch.backward`, then logs the diagnostics.

        Returns:
            The aggregation, in the units of ``.grad``: under a GradScaler times its scale.
        """
        trainer, total = self._module.trainer, self._total
        result = super().backward()
        if total is not None:
            trainer.precision_plugin.post_backward(total, self._module)
        scale = loss_scale(trainer)
        norm = result.diagnostics.update_norm / scale
        _log(self._module, self._name, result.diagnostics._replace(update_norm=norm))
        losses = None if result.losses is None else result.losses / scale
        return result._replace(losses=losses)

    def clear(self) -> None:
        """Forgets the tasks added so far, and their graphs."""
        super().clear()
        self._total = None


def _take(task: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    """The gradient of a parameter, taken out of its task so that it is held once."""
    gradient = task.pop(name, None)
    return torch.zeros_like(parameter) if gradient is None else gradient


def _log(module: pl.LightningModule, name: str, diagnostics: Diagnostics) -> None:
    module.log_dict({f"{name}/{key}": value for key, value in diagnostics.log().items()})
