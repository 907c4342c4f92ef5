"""What a Trainer of Lightning says of itself, and which ones these adapters refuse."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.frameworks import require

require("lightning")

import lightning.pytorch as pl  # noqa: E402 - after require, whose error names the install command
from lightning.pytorch.callbacks import GradientAccumulationScheduler  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy  # noqa: E402


def check_trainer(trainer: pl.Trainer, aggregator: Aggregator, /) -> None:
    """Raises a TypeError or ValueError unless the aggregation is exact under this Trainer."""
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"expected a Trainer of lightning.pytorch, found one of {type(trainer).__module__}; "
            "import lightning.pytorch as pl throughout"
        )
    # DeepSpeed's strategy is a subclass.
    over_ranks = type(trainer.strategy) is DDPStrategy and aggregator.ranks is not None
    if not (over_ranks or isinstance(trainer.strategy, SingleDeviceStrategy)):
        raise ValueError(
            f"expected one device, found {type(trainer.strategy).__name__}, which averages the "
            "tasks of several devices by itself; pass strategy='ddp' and "
            "ga.distributed(aggregator), or Trainer(devices=1, strategy='auto') and all the tasks "
            "of a step to that one"
        )
    if scaler(trainer) is not None and aggregator.nonfinite != "propagate":
        raise ValueError(
            "expected nonfinite='propagate' under a GradScaler, which lowers its scale at every "
            f"overflow that it sees, found {aggregator.nonfinite!r}; pass it to the aggregator, "
            "or train with precision='bf16-mixed'"
        )


def accumulates(trainer: pl.Trainer, /) -> bool:
    """Whether a step has several training steps, at any time, or those of several devices."""
    return max(trainer.accumulate_grad_batches, trainer.world_size) > 1 or any(
        isinstance(callback, GradientAccumulationScheduler)
        and callback.going_to_accumulate_grad_batches()
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


def closes_window(trainer: pl.Trainer) -> bool:
    """Whether the optimizer steps after this training step: as Lightning decides it."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    last = trainer.is_last_batch or ready == trainer.num_training_batches
    return last or ready % trainer.accumulate_grad_batches == 0


def trained(trainer: pl.Trainer) -> Iterator[nn.Parameter]:
    """Parameters of the one optimizer that automatic optimization has."""
    for group in trainer.optimizers[0].param_groups:
        yield from group["params"]


def named(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in the module, else by their positions."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names.get(id(p), f"parameter {index}"): p for index, p in enumerate(trained(trainer))}


def scaler(trainer: pl.Trainer) -> Any:
    """The precision plugin's GradScaler, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale(trainer: pl.Trainer) -> float:
    """What the GradScaler has multiplied the losses by."""
    found = scaler(trainer)
    return 1.0 if found is None else float(found.get_scale())
