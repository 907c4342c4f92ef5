"""Contestants that take turns in one process, and what each needs of memory."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Step = Callable[[], Any]


@dataclass(frozen=True)
class Contestant:
    """A name, and what makes the step that is timed.

    ``comparable``: its step returns the update of the case, as named tensors or one tensor.
    ``of_torch``: torch knows the memory that it takes of a device.
    """

    name: str
    make: Callable[[], Step]
    comparable: bool = True
    of_torch: bool = True


@dataclass(frozen=True)
class Bar:
    """What is to be reached: a ratio of two contestants' times, or of their peaks of memory."""

    numerator: str
    denominator: str
    at_most: float
    of_memory: bool = False

    def __str__(self) -> str:
        what = "memory" if self.of_memory else "time"
        return f"{what} of *{self.numerator}* / {what} of *{self.denominator}*"


@dataclass(frozen=True)
class Case:
    """Contestants that do the same work, and the bars between them.

    ``tolerance``: how far apart two updates may be, as a share of the larger one's length.
    """

    name: str
    title: str
    contestants: Sequence[Contestant]
    bars: Sequence[Bar] = ()
    tolerance: float = 1e-3
    rounds: int = 15


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: the median of all rounds, and the quartiles."""

    median: float
    lower: float
    upper: float


def compare(case: Case, steps: dict[str, Step]) -> None:
    """Raises unless all updates are one another's; also the first, untimed call of each."""
    updates = {}
    for contestant in case.contestants:
        result = steps[contestant.name]()
        if contestant.comparable:
            updates[contestant.name] = flat(result)
    first = next(iter(updates), "")
    for name in updates.keys() - {first}:
        length = updates[first].norm().item()
        difference = (updates[name] - updates[first]).norm().item()
        if not difference <= case.tolerance * length:
            raise AssertionError(
                f"{case.name}: the updates of {first} and {name} are {difference / length:.1e} "
                "of their length apart"
            )


def flat(update: Any) -> Tensor:
    """The update as one vector, by the names of its leaves."""
    leaves = [update[name] for name in sorted(update)] if isinstance(update, dict) else [update]
    return torch.cat([as_tensor(leaf).flatten() for leaf in leaves])


def as_tensor(leaf: Any) -> Tensor:
    return (
        leaf.detach() if isinstance(leaf, Tensor) else torch.tensor(np.array(leaf), device=_device)
    )


def take_turns(steps: dict[str, Step], rounds: int, slot: float = 0.05) -> dict[str, list[float]]:
    """Seconds a step of every contestant in every round; one turn lasts at least a slot."""
    repeats = {}
    for name, step in steps.items():
        step()
        repeats[name] = max(1, round(slot / max(seconds_of(step, 1), 1e-7)))
    gc.collect()
    gc.disable()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        order = list(steps) if number % 2 else list(reversed(steps))
        for name in order:
            times[name].append(seconds_of(steps[name], repeats[name]))
        gc.collect()
    gc.enable()
    return times


def seconds_of(step: Step, repeats: int) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - start) / repeats


def wait() -> None:
    """Until the device has done what it was told to."""
    if device_module() is not None:
        device_module().synchronize()


_device = torch.device("cpu")


def use_device(name: str) -> None:
    """What the benchmarks of this process run on."""
    global _device
    _device = torch.device(name)
    torch.backends.cudnn.allow_tf32 = False  # its rounding, as large as what is compared


def device() -> torch.device:
    return _device


def device_module() -> Any:
    """torch.cuda and the like, of the device that the benchmarks run on; None for a CPU."""
    return None if _device.type == "cpu" else torch.get_device_module(_device)


def timing(times: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(times, n=4)
    return Timing(median, lower, upper)


def ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> Timing:
    """Of the two contestants' times, round by round."""
    pairs = zip(times[numerator], times[denominator], strict=True)
    return timing([a / b for a, b in pairs])


def peak_on_device(contestant: Contestant, step: Step) -> int | None:
    """Bytes of the device that a step needs; None where torch does not know, and on a CPU."""
    module = device_module()
    if module is None or not contestant.of_torch:
        return None
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    step()
    peak: int = module.max_memory_allocated() - before
    return peak


def peak_memory(step: Step) -> int:
    """Bytes that a step needs beyond what the process holds before it (Linux).

    A first call makes what is made once; what the allocator kept of it is given back.
    """
    step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def status(entry: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry + ":"))
