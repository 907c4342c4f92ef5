"""Work on a GPU that is recorded once and then replayed, without the host between its kernels."""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UPS = 2
"""Calls before the one that may not wait: in them libraries make their handles, compilers code."""


class NotCapturedError(Exception):
    """A function that cannot be a CUDA graph; the message says why."""


def captured(function: Callable[[], None], changed: Sequence[Tensor]) -> Callable[[], None]:
    """A function of a GPU as one CUDA graph.

    It is called a few times. What these calls change is put back.

    Args:
        function: Reads and writes tensors that stay where they are. The current stream must not be
            the default one, and the graph has to be replayed on it: the workspaces that libraries
            have are those of a stream, and graphs of other streams may run at the same time.
        changed: Those tensors that it writes and that later calls read.

    Raises:
        NotCapturedError: It waits for the device, or does something else that a graph cannot hold.
    """
    before = [tensor.clone() for tensor in changed]
    try:
        return record(function)
    except RuntimeError as error:
        torch.cuda.synchronize()
        raise NotCapturedError(str(error).partition("\n")[0]) from error
    finally:
        for tensor, content in zip(changed, before, strict=True):
            tensor.copy_(content)


def record(function: Callable[[], None]) -> Callable[[], None]:
    """Its replay; a RuntimeError where there is none."""
    for _ in range(WARM_UPS):
        function()
    with waiting_refused():  # a capture that fails leaves more behind than a warm-up that does
        function()
    graph = torch.cuda.CUDAGraph()
    with uncollected(), torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    replay: Callable[[], None] = graph.replay
    return replay


@contextmanager
def waiting_refused() -> Iterator[None]:
    """A RuntimeError where PyTorch makes the host wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode of PyTorch is a prototype
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected: an older graph that is thrown away may spoil the one that begins."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The memory of a GPU that a call takes besides what is taken already."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
