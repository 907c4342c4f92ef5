"""Where a task stack is, and whether the fused kernels may read it there."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from gradagree_opt.core.transforms import in_forward_mode, in_tracer, in_transform, is_wrapped

FUSED_DEVICES = {"cuda"}
"""Kinds of device that the fused kernels run on, where Triton is installed."""
FUSED_TASKS = 1024
"""Tasks that they take at most."""
FUSED_GRAMIAN_TASKS = 64
"""Tasks whose Gram matrix they form; beyond, and in float64, a product of matrices is faster."""
DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def fused_kernels(leaves: Sequence[Tensor], /, *, gramian: bool = False) -> ModuleType | None:
    """:mod:`gradagree_opt.core.fused` if it can read these task-stacked leaves, else None.

    It reads memory: nothing that a transform, a tracer or autograd looks at passes through it.
    """
    first = leaves[0]
    if torch.compiler.is_compiling() or type(first) not in (Tensor, Parameter):
        return None
    device, n = first.device, first.shape[0]
    if device.type not in FUSED_DEVICES or n > (FUSED_GRAMIAN_TASKS if gramian else FUSED_TASKS):
        return None
    if in_tracer() or in_forward_mode():
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # the table of pointers is a copy from the host
    graph = torch.is_grad_enabled()
    for leaf in leaves:
        if (
            type(leaf) not in (Tensor, Parameter)
            or leaf.dtype not in DTYPES
            or leaf.device != device
            or leaf.layout is not torch.strided
            or leaf.is_neg()
            or (graph and leaf.requires_grad)
            or (gramian and leaf.dtype == torch.float64)
            or is_wrapped(leaf)
        ):
            return None
    return _fused(device.type)


def runs_at_once(tensor: Tensor, /) -> bool:
    """Whether a computation from the tensor gives the same later as it gives now.

    Not inside a transform, nor under a compiler or a tracer, nor while a CUDA graph is captured.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and not in_transform()
        and not in_tracer()
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


@cache
def _fused(kind: str) -> ModuleType | None:
    """The kernels, after a trial: Triton may miss a C compiler, or not know the device."""
    try:
        kernels = import_module("gradagree_opt.core.fused")
        for _ in range(2):  # the second launch of a compiled kernel needs Triton 3.3
            kernels.combine([torch.ones(1, 1, device=kind)], torch.ones(1, device=kind))
    except Exception:  # of many kinds: ImportError, Triton's, the driver's
        return None
    return kernels
