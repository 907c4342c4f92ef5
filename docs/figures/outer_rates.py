"""Draws what four methods reach at every outer rate, from the recorded study of sines.

    python docs/figures/outer_rates.py [FOLDER]

writes outer-rates.png into the folder, by default the script's own.
"""

import sys
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gradagree_opt.ablation.report.style import COLOURS, INK, STYLE, legend, plain_log, save

RUNS = Path(__file__).parents[1] / "results/equal-sine/results.csv"
TUNING_SEEDS = [101, 102, 103]
DIVERGED = 1.0  # mean squared error; no trained network comes near it
LOOKS = {
    "equal agreement": ("Equal Agreement", COLOURS[1], "o"),
    "mean at equal agreement's length": ("the mean at Equal Agreement's length", COLOURS[2], "^"),
    "mean": ("the mean", INK, "s"),
    "agreement": ("Gradient Agreement", COLOURS[0], "D"),
}


def losses() -> pd.Series:
    """Mean validation loss after five steps on the seeds of the tuning, by method and rate."""
    runs = pd.read_csv(RUNS).query("steps == 5 and seed in @TUNING_SEEDS")
    return runs.groupby(["method", "rate"])["validation_loss"].mean()


def draw() -> Figure:
    """One line a method, the lowest point of each ringed."""
    found = losses()
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    shown: list[float] = []
    for method, (label, colour, marker) in LOOKS.items():
        trained = found[method][found[method] < DIVERGED]
        axes.plot(trained.index, trained, color=colour, marker=marker, label=label)
        axes.plot(
            trained.idxmin(), trained.min(), "o", color=colour, markersize=13, fillstyle="none"
        )
        shown += trained.tolist()
    plain_log(axes, shown)
    axes.set_xscale("log", base=2)
    rates = sorted({rate for method, rate in found.index if method in LOOKS and rate < 4})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("outer rate")
    axes.set_ylabel("validation error after 5 steps")
    legend(figure, axes, "", "outside lower center", columns=2)
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    with matplotlib.rc_context(STYLE):
        picture = draw()
    (folder / "outer-rates.png").write_bytes(save(picture, "png"))
