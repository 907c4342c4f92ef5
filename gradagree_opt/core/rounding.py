"""What rounding depends on: ranks that have it in common compute the same bits."""

import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

OF_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags")
OF_ARM = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features")
"""Lines of /proc/cpuinfo that libraries choose their kernels by."""


def rounding_of(device: torch.device, /) -> str:
    """A description that two processes have in common if they round alike on such a device.

    >>> rounding_of(torch.device("cpu")) == rounding_of(torch.device("cpu"))
    True
    """
    settings = [torch.get_num_threads(), torch.get_default_dtype(), *_precisions()]
    return f"{_machine()} {_accelerator(device)} {settings}"


@cache
def _machine() -> str:
    """The processor and the build of PyTorch, which do not change."""
    cores = os.cpu_count()
    with suppress(AttributeError):  # not on every system
        cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()} {cores} {_processor()} {torch.__config__.show()}"


def _precisions() -> list[str]:
    """Settings of float32 products; torch refuses the older query after the newer setting."""
    backends = [torch.backends.cuda, torch.backends.mkldnn]
    found = [getattr(getattr(each, "matmul", None), "fp32_precision", "") for each in backends]
    return found if any(found) else [torch.get_float32_matmul_precision()]  # torch 2.8 and older


def _processor() -> list[str]:
    with suppress(OSError):
        first, *_ = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")
        lines = [line.partition(":") for line in first.splitlines()]
        return [value for name, _, value in lines if name.strip() in OF_PROCESSOR + OF_ARM]
    return [platform.processor()]


@cache
def _accelerator(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    module = torch.get_device_module(device.type)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else ""
