"""Random signals, and what the host has to wait for: reads from a device, and copies to it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SIMILARITIES = ("cosine", "inner")
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"}


def rows(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def units(signals: Tensor) -> Tensor:
    """u_i = g_i / ‖g_i‖."""
    return signals / signals.norm(dim=1, keepdim=True)


def median_norm(signals: Tensor) -> float:
    norms = signals.norm(dim=1)
    return float(np.median(norms[norms > 0].numpy()))


class _HostReads(TorchDispatchMode):
    """Notes every operation whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name in READS or (name == "_to_copy" and result.device != args[0].device):
            self.names.append(name)
        return result


@pytest.fixture
def host_reads() -> Iterator[list[str]]:
    """Names of the operations since the test began that read a tensor on the host."""
    with _HostReads() as mode:
        yield mode.names
