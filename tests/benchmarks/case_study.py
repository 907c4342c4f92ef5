"""How long a full sine study takes: a line through shorter sweeps of all its runs."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from gradagree_opt.ablation.runs.sweep import Sweep
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study

METHODS, RATES, SEEDS, ITERATIONS = 8, 3, 5, 30_000
SHORT, LONG = 1_500, 4_500
TITLE = (
    f"A sine study of {METHODS * RATES * SEEDS} runs (the one that ships has 81): {METHODS} "
    f"methods, {RATES} outer rates, each from {SEEDS} seeds, {ITERATIONS} iterations on all cores, "
    f"by a line through sweeps of {SHORT} and {LONG} iterations"
)
BAR_MINUTES = 40


def measure() -> dict[str, Any]:
    """Seconds of both sweeps after one that compiles, and the minutes of the full study."""
    compiling = seconds_of(SHORT)
    short, long = seconds_of(SHORT), seconds_of(LONG)
    rate = (long - short) / (LONG - SHORT)
    full = compiling + (ITERATIONS - SHORT) * rate
    return {"seconds": {"cold": compiling, "short": short, "long": long}, "minutes": full / 60}


def seconds_of(iterations: int) -> float:
    """All runs of the study, every rate from every seed, with that many iterations each."""
    study = load("sine")
    study = study.model_copy(
        update={
            "methods": study.methods[:METHODS],
            "outer": study.outer.model_copy(update={"rates": study.outer.rates[:RATES]}),
            "tuning": study.tuning.model_copy(update={"seeds": SEEDS}),
            "seeds": study.seeds[:SEEDS],
            "iterations": iterations,
        }
    )
    study = Study.model_validate(study.model_dump())
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(study, Path(folder), None, warn=print)
        start = time.perf_counter()
        sweep.run(os.cpu_count() or 1, report=lambda steps: None)
        return time.perf_counter() - start
