"""The benchmarks' results as a page."""

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .case_growth import BAR
from .case_study import BAR_MINUTES, LONG, SHORT
from .timing import device_module

PACKAGES = ("torch", "jax", "learn2learn", "higher", "torchopt", "torchjd")
INTRODUCTION = """# Benchmarks

This page says how long a step takes beside other libraries, and what memory it adds. On a CPU, a
single step on a large model is fastest with `engine="matrix_free"`; on a GPU that needs the least
memory, but `"stacked"` is faster. For thousands of small steps take `compile=True`.
[Engines](engines.md) says what each engine can serve.

In every case the contestants take turns in one process, after their updates have been checked
against each other. Times are medians over the rounds, with the quartiles in brackets; ratios are
medians of the rounds' own ratios. A peak of memory is what a step adds to its process, each
contestant in a fresh one, or to what a GPU holds. `make bench` writes this page anew, with
`DEVICE=cuda` that of a GPU.
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
    versions = []
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # of a peer of other cases
            versions.append(f"{name} {importlib.metadata.version(name)}")
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
    lines += ["", "| ratio | found |", "|---|---|"]
    return lines + [ratio_line(bar, result["memory"]) for bar in result["bars"]]


def ratio_line(bar: dict[str, Any], memory: dict[str, int]) -> str:
    shown = f"{ratio(bar, memory):.3g}"
    if not bar["of_memory"]:
        shown += f" [{bar['found']['lower']:.3g}, {bar['found']['upper']:.3g}]"
    return f"| {bar['text']} | {shown} |"


def ratio(bar: dict[str, Any], memory: dict[str, int]) -> float:
    if bar["of_memory"]:
        return memory[bar["numerator"]] / memory[bar["denominator"]]
    return float(bar["found"]["median"])


def study(found: dict[str, Any]) -> list[str]:
    cold, short, long = (f"{found['seconds'][name]:.0f} s" for name in ("cold", "short", "long"))
    head = f"{SHORT} iterations, and compiling | {SHORT} iterations | {LONG} iterations"
    return [
        f"| {head} | full study (minutes) |",
        "|---|---|---|---|",
        f"| {cold} | {short} | {long} | {found['minutes']:.3g} |",
    ]


def growth(found: dict[str, Any]) -> list[str]:
    lines = ["| | time at the sizes (ms) | exponent |", "|---|---|---|"]
    for name, each in found.items():
        times = ", ".join(
            f"{size:g}: {1e3 * seconds:.3g}"
            for size, seconds in zip(each["sizes"], each["seconds"], strict=True)
        )
        lines.append(f"| {name} | {times} | {each['exponent']:.4g} |")
    return lines


def missed(result: dict[str, Any]) -> list[str]:
    """The targets that a case misses: for who works on the library, docs/performance.md."""
    memory = result.get("memory", {})
    found = [(bar["text"], ratio(bar, memory), bar["at_most"]) for bar in result.get("bars", ())]
    found += [(name, each["exponent"], BAR) for name, each in result.get("growth", {}).items()]
    if "study" in result:
        found.append(("minutes", result["study"]["minutes"], BAR_MINUTES))
    return [
        f"missed: {text} is {value:.3g}, target {target:.3g}"
        for text, value, target in found
        if value > target
    ]
