"""What the adapter of Lightning reads of a Trainer.

Its two distributions, ``lightning.pytorch`` and ``pytorch_lightning``, have classes of the same
names that know nothing of each other: they are told by name.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from gradagree_opt.core.aggregation import Aggregator


def is_a(name: str, thing: object) -> bool:
    """Whether it is of Lightning's class of that name, in either distribution."""
    packages = ("lightning.pytorch.", "pytorch_lightning.")
    classes = type(thing).__mro__
    return any(each.__name__ == name and each.__module__.startswith(packages) for each in classes)


def check_trainer(trainer: Any, aggregator: Aggregator) -> None:
    """Raises a ValueError for several devices, or a GradScaler that would see no overflow."""
    # DeepSpeed's strategy is a subclass of that of DDP.
    over_ranks = type(trainer.strategy).__name__ == "DDPStrategy" and aggregator.ranks is not None
    if not (over_ranks or is_a("SingleDeviceStrategy", trainer.strategy)):
        raise ValueError(
            f"expected one device, found {type(trainer.strategy).__name__}, which averages the "
            "tasks of several devices by itself; pass strategy='ddp' and "
            "ga.distributed(aggregator), or Trainer(devices=1, strategy='auto') and all the tasks "
            "of a step to that one"
        )
    if scaler_of(trainer) is not None and aggregator.nonfinite != "propagate":
        raise ValueError(
            "expected nonfinite='propagate' under a GradScaler, which lowers its scale at every "
            f"overflow that it sees, found {aggregator.nonfinite!r}; pass it to the aggregator, "
            "or train with precision='bf16-mixed'"
        )


def accumulates(trainer: Any) -> bool:
    """Whether a step is more than one training batch, now or in a later epoch, of all devices."""
    return max(trainer.accumulate_grad_batches, trainer.world_size) > 1 or any(
        is_a("GradientAccumulationScheduler", callback)
        and callback.going_to_accumulate_grad_batches()
        for callback in trainer.callbacks
    )


def closes_window(trainer: Any) -> bool:
    """Whether the optimizer steps after this training step: as Lightning decides it."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    last = trainer.is_last_batch or ready == trainer.num_training_batches
    return bool(last or ready % trainer.accumulate_grad_batches == 0)


def trained(trainer: Any) -> Iterator[nn.Parameter]:
    """Parameters of the one optimizer that automatic optimization has."""
    for group in trainer.optimizers[0].param_groups:
        yield from group["params"]


def named(trainer: Any, module: nn.Module) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in the module, else by their positions."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names.get(id(p), f"parameter {index}"): p for index, p in enumerate(trained(trainer))}


def scaler_of(trainer: Any) -> Any:
    """The precision plugin's GradScaler, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale(trainer: Any) -> float:
    """What a GradScaler has multiplied the loss by."""
    scaler = scaler_of(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())
