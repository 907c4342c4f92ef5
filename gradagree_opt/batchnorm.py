"""BatchNorm's running statistics where all tasks run at once: a copy for each task, or refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """Running statistics of a module's BatchNorm layers, as far as a forward pass changes them.

    Args:
        module: any module; layers in evaluation mode, and those that track nothing, are left out.

    Raises:
        ValueError: a layer keeps a cumulative average (``momentum=None``), which reads its count.
    """

    def __init__(self, module: nn.Module, /) -> None:
        # momentum and the buffers are Optional, but never None here.
        self._layers: dict[str, Any] = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
        }
        for name, layer in self._layers.items():
            if layer.momentum is None:
                raise ValueError(
                    f"expected BatchNorm with a momentum, found a cumulative average in {name!r}; "
                    "give it momentum=0.1 or track_running_stats=False, or loop with TaskBatch"
                )

    def for_tasks(self, n: int, /) -> dict[str, Tensor]:
        """A copy for each of n tasks, ``[n, *shape]``, by the buffer's name in the module."""
        return {
            f"{name}.{key}": buffer.expand(n, *buffer.shape).clone()
            for name, layer in self._layers.items()
            for key, buffer in layer.named_buffers()
        }

    def follow(self, copies: dict[str, Tensor], /) -> None:
        """Changes the module's statistics as if one task had come after the other.

        k forward passes take a statistic r to (1 − momentum)^k r + c. A task's own copy shows its
        c, which is then added after the tasks before it.

        Args:
            copies: what :meth:`for_tasks` gave, after each task's forward passes.
        """
        for name, layer in self._layers.items():
            counts = copies[f"{name}.num_batches_tracked"]
            keep = (1 - layer.momentum) ** (counts[0] - layer.num_batches_tracked).double()
            powers = keep ** torch.arange(len(counts), -1, -1, device=counts.device)
            for key in ("running_mean", "running_var"):
                before = cast(Tensor, getattr(layer, key))
                alone = copies[f"{name}.{key}"].double()
                before.copy_(powers @ torch.cat([before.unsqueeze(0), alone - keep * before]))
            layer.num_batches_tracked += (counts - layer.num_batches_tracked).sum()


class ChangedBufferError(RuntimeError):
    """A model changes a buffer where all tasks start from the same one."""


@contextmanager
def statistics_refused() -> Iterator[None]:
    """A context: where a model changes a buffer under torch.func, one sentence says so.

    Raises:
        ValueError: in place of torch.func's error, or of a :class:`ChangedBufferError`.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        # What explains it advises a loop, as this does.
        changed = error if isinstance(error, ChangedBufferError) else error.__cause__
        if isinstance(changed, ChangedBufferError):
            raise ValueError(
                f"expected a model that changes no buffer, found {changed}; call eval() on the "
                "module that does, if it changes it in training alone, or loop with TaskBatch"
            ) from error
        if "mutate a captured Tensor" in message or "will be updated in place" in message:
            raise ValueError(
                "expected a model that changes no buffer, found one that does, as BatchNorm its "
                "running statistics; call torch.func.replace_all_batch_norm_modules_(model), or "
                "give BatchNorm track_running_stats=False"
            ) from error
        raise
