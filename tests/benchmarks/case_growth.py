"""How time grows with the number of tasks and of parameters: exponents of a power law."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gradagree_opt as ga

from .timing import Step, take_turns

TASK_COUNTS = [4, 8, 16, 32, 64, 128, 256]
ENTRY_COUNTS = [10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000]
TITLE = "Growth: exponent of time in the number of tasks n and of parameters d (1 is linear)"
BAR = 1.05
Growth = dict[str, dict[str, Any]]


def measure() -> Growth:
    """For each of what grows: the sizes, the median seconds at each, and the exponent."""
    aggregate = {
        "aggregation, n at d = 100 000": {n: aggregation(n, 100_000) for n in TASK_COUNTS},
        "aggregation, d at n = 8": {d: aggregation(8, d) for d in ENTRY_COUNTS},
    }
    engines = {
        f"{engine}, n at d = 0.3 million": {n: multitask(engine, n) for n in TASK_COUNTS}
        for engine in ("stacked", "matrix_free", "streamed")
    }
    return {name: fitted(steps) for name, steps in (aggregate | engines).items()}


def fitted(steps: dict[int, Step]) -> dict[str, Any]:
    times = take_turns({str(size): step for size, step in steps.items()}, rounds=5, slot=0.02)
    medians = [float(np.median(each)) for each in times.values()]
    exponent = np.polyfit(np.log(list(steps)), np.log(medians), 1)[0]
    return {"sizes": list(steps), "seconds": medians, "exponent": float(exponent)}


def aggregation(n: int, d: int) -> Step:
    stack = torch.randn(n, d)
    return partial(ga.GradientAgreement(), stack)


def multitask(engine: Any, n: int) -> Step:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 1000, generator=generator) / 30
    x = torch.randn(n, 10, 300, generator=generator)
    y = torch.randn(n, 10, 1000, generator=generator)

    def loss_fn(weight: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (torch.tanh(batch[0] @ weight) - batch[1]).square().mean()

    aggregator = ga.GradientAgreement()
    return lambda: ga.aggregate_gradients(loss_fn, weight, (x, y), aggregator, engine=engine)
