"""What autograd graphs hold on to, in bytes."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Saved:
    """A tensor that an autograd graph holds on to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Peak:
    """Bytes that autograd graphs hold on to: now, and at most so far."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Saved:
        saved, size = Saved(tensor), tensor.nbytes
        self._add(size)
        weakref.finalize(saved, self._add, -size)
        return saved

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@contextmanager
def saved_bytes() -> Iterator[Peak]:
    peak = Peak()
    with torch.autograd.graph.saved_tensors_hooks(peak.pack, lambda saved: saved.tensor):
        yield peak
