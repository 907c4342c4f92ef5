"""Work on a GPU that is recorded once and then replayed, without the host between its kernels."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UPS = 2
"""Calls before the one that may not wait: in them libraries make their handles, compilers code."""


def captured(
    function: Callable[[], None],
    changed: Sequence[Tensor],
    device: torch.device,
    tell: Callable[[str], None],
) -> Callable[[], None]:
    """The function as a CUDA graph; itself on a CPU, or where it cannot be captured.

    It is called a few times. What these calls change is put back.

    Args:
        function: Reads and writes tensors that stay where they are.
        changed: Those that it writes and that later calls read.
        device: Where they are. On a GPU the current stream must not be the default one; the graph
            has to be replayed on it, as the graphs of other streams may run at the same time.
        tell: Called with the reason where it cannot be captured.
    """
    if device.type == "cpu":
        return function
    before = [tensor.clone() for tensor in changed]
    try:
        return record(function)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        tell(str(error).partition("\n")[0])
        return function
    finally:
        for tensor, content in zip(changed, before, strict=True):
            tensor.copy_(content)


def record(function: Callable[[], None]) -> Callable[[], None]:
    """Its replay.

    Raises:
        RuntimeError: It waits for the device, or does something else that a graph cannot hold.
    """
    for _ in range(WARM_UPS):
        function()
    with waiting_refused():  # a capture that fails leaves more behind than a warm-up that does
        function()
    graph = torch.cuda.CUDAGraph()
    # A stream of its own: the workspaces of the libraries, which replays use too, belong to one.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
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


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The memory of a GPU that a call takes besides what is taken already."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
