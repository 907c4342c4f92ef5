"""The benchmarks' results as a page."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .case_growth import BAR
from .case_study import BAR_MINUTES, LONG, SHORT
from .timing import device_module

PACKAGES = ("torch", "jax", "learn2learn", "higher", "torchopt", "torchjd")
INTRODUCTION = """# Benchmarks

Written by `make bench`, with DEVICE=cuda for a GPU. In every case the contestants take turns in one
process, after their updates have been checked against each other: medians over the rounds,
quartiles in brackets. Ratios are medians of the rounds' own ratios. A peak of memory is what a step
adds to its process, each in a fresh one, or to what a GPU holds. A bar is what a CPU was to reach,
set before the library was written. What does not is in **bold**; [performance.md](performance.md)
says where the time goes.
"""


def page(cases: dict[str, Any]) -> str:
    return "\n".join([INTRODUCTION, *(section(name, result) for name, result in cases.items())])


def machine() -> str:
    """Processor, threads, and the versions of what was run."""
    cpu = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (cpu.read_text().splitlines() if cpu.exists() else [])
        if line.startswith("model name")
    ]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    module = device_module()
    device = [] if module is None else [module.get_device_name()]
    processor = f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"
    threads = f"{torch.get_num_threads()} threads of torch"
    return ", ".join(
        [*device, processor, threads, f"Python {platform.python_version()}", *versions]
    )


def section(name: str, result: dict[str, Any]) -> str:
    lines = [f"## {name.replace('_', ' ')}", "", f"{result['title']}.", ""]
    lines += [f"On {result['machine']}.", ""]
    if "growth" in result:
        lines += growth(result["growth"])
    elif "study" in result:
        lines += study(result["study"])
    else:
        lines += contestants(result)
    return "\n".join([*lines, ""])


def contestants(result: dict[str, Any]) -> list[str]:
    lines = ["| | time (ms) | peak of memory (MiB) |", "|---|---|---|"]
    for name, time in result["seconds"].items():
        peak = result["memory"][name]
        spread = f"[{1e3 * time['lower']:.3g}, {1e3 * time['upper']:.3g}]"
        shown = "–" if peak is None else f"{peak / 2**20:.1f}"
        lines.append(f"| {name} | {1e3 * time['median']:.3g} {spread} | {shown} |")
    lines += ["", "| bar | at most | found |", "|---|---|---|"]
    return lines + [bar_line(bar, result["memory"]) for bar in result["bars"]]


def bar_line(bar: dict[str, Any], memory: dict[str, int]) -> str:
    if bar["of_memory"]:
        shown = marked(memory[bar["numerator"]] / memory[bar["denominator"]], bar["at_most"])
    else:
        found = bar["found"]
        shown = marked(found["median"], bar["at_most"])
        shown += f" [{found['lower']:.3g}, {found['upper']:.3g}]"
    return f"| {bar['text']} | {bar['at_most']:.3g} | {shown} |"


def marked(found: float, at_most: float, digits: int = 3) -> str:
    shown = f"{found:.{digits}g}"
    return shown if found <= at_most else f"**{shown}**"


def study(found: dict[str, Any]) -> list[str]:
    cold, short, long = (f"{found['seconds'][name]:.0f} s" for name in ("cold", "short", "long"))
    head = f"{SHORT} iterations, and compiling | {SHORT} iterations | {LONG} iterations"
    return [
        f"| {head} | full study (minutes), at most {BAR_MINUTES} |",
        "|---|---|---|---|",
        f"| {cold} | {short} | {long} | {marked(found['minutes'], BAR_MINUTES)} |",
    ]


def growth(found: dict[str, Any]) -> list[str]:
    lines = [f"| | time at the sizes (ms) | exponent, at most {BAR} |", "|---|---|---|"]
    for name, each in found.items():
        times = ", ".join(
            f"{size:g}: {1e3 * seconds:.3g}"
            for size, seconds in zip(each["sizes"], each["seconds"], strict=True)
        )
        lines.append(f"| {name} | {times} | {marked(each['exponent'], BAR, 4)} |")
    return lines
