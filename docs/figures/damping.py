"""Draws the error of Equal Agreement over its damping, from the recorded study.

    python docs/figures/damping.py [FOLDER]

writes damping.png into the folder, by default the script's own.
"""

import sys
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gradagree_opt.ablation.report.style import COLOURS, INK, STYLE, legend, plain_log, save

TABLE = Path(__file__).parents[1] / "results/damping/table.csv"
NAME = "λ = "


def draw() -> Figure:
    """The error by damping, and the mean's as a dashed line."""
    table = pd.read_csv(TABLE).set_index("method")
    error, half = table["mean_5_steps"], table["half_width_5_steps"]
    names = sorted(name for name in table.index if name.startswith(NAME))
    damping = [float(name.removeprefix(NAME)) for name in names]
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    axes.errorbar(
        damping, error[names], half[names], color=COLOURS[1], marker="o", label="Equal Agreement"
    )
    axes.axhline(error["mean"], color=INK, linestyle="--", label="mean")
    plain_log(axes, error.tolist())
    axes.set_xscale("log")
    axes.set_xticks(damping, [f"{value:g}" for value in damping])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("damping λ")
    axes.set_ylabel("test mean squared error after 5 steps")
    legend(figure, axes, "", "outside lower center", columns=2)
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    with matplotlib.rc_context(STYLE):
        picture = draw()
    (folder / "damping.png").write_bytes(save(picture, "png"))
