"""The device that a study runs on: which one, what it is called, and its arithmetic."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict

from gradagree_opt.ablation.section import StudyError

CPU = torch.device("cpu")
Arithmetic: TypeAlias = Literal["float32", "TF32"]


class Hardware(BaseModel):
    """What a run was trained and tested on.

    Attributes:
        device: "cpu" or "cuda".
        name: What the processor or the GPU calls itself.
        arithmetic: Of products of matrices and of convolutions; all else is in float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["cpu", "cuda"]
    name: str
    arithmetic: Arithmetic


def choose_device(wanted: str) -> torch.device:
    """The device that a study asks for; "auto" is a GPU where there is one.

    Raises:
        StudyError: There is no such device here.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise StudyError(
            f"expected a GPU for the device {wanted!r}, found none that PyTorch "
            f"{torch.__version__} can use; give cpu"
        )
    index = int(wanted.partition(":")[2] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        raise StudyError(
            f"expected a GPU of number {count - 1} at most, found {wanted!r}; give cuda:{count - 1}"
        )
    return torch.device("cuda", index)


def describe(device: torch.device, tf32: bool) -> Hardware:
    """What the records of its runs say of a device; a CPU has no TF32."""
    if device.type == "cpu":
        return Hardware(device="cpu", name=processor(), arithmetic="float32")
    name = torch.cuda.get_device_name(device)
    return Hardware(device="cuda", name=name, arithmetic="TF32" if tf32 else "float32")


def memory_of(device: torch.device) -> int | None:
    """The bytes that it has, or this machine for a CPU; None where the system does not tell."""
    if device.type != "cpu":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no such function
        return None


def processor() -> str:
    """The model of the CPU, where the system tells it, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, models), platform.processor() or platform.machine() or "unknown")


@contextmanager
def arithmetic(device: torch.device, tf32: bool) -> Iterator[None]:
    """On a GPU the products that the study asks for, and convolutions that repeat to the bit."""
    if device.type == "cpu":
        yield
        return
    cudnn = torch.backends.cudnn
    before = (
        torch.get_float32_matmul_precision(),
        cudnn.allow_tf32,
        cudnn.deterministic,
        cudnn.benchmark,
    )
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = tf32, True, False
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before[1:]
