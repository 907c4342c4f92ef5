"""Draws the error over the power of the Gram matrix, from the recorded study.

    python docs/figures/gramian_powers.py [FOLDER]

writes gramian-powers.png into the folder, by default the script's own.
"""

import sys
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from gradagree_opt.ablation.report.style import INK, STYLE, plain_log, save

UNTRAINED = 4.28  # error of the network as it starts
TABLE = Path(__file__).parents[1] / "results/gramian-powers/table.csv"
NAMES = {
    -1: "Equal Agreement,\ninner products",
    0: "mean",
    1: "Gradient Agreement,\nup to its length",
}


def points(table: pd.DataFrame) -> pd.DataFrame:
    """Power, error and half width of its interval, by rising power, of those that train at all."""
    powers = table["method"].replace("mean", "k = 0").str.removeprefix("k = ").astype(float)
    found = pd.DataFrame(
        {"power": powers, "error": table["mean_5_steps"], "half": table["half_width_5_steps"]}
    )
    return found[found["error"] < UNTRAINED].sort_values("power")


def draw() -> Figure:
    found = points(pd.read_csv(TABLE))
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    axes.errorbar(found["power"], found["error"], found["half"], color=INK, marker="o")
    plain_log(axes, found["error"].tolist())
    ticks = [f"{power:g}\n{NAMES.get(power, '')}" for power in found["power"]]
    axes.set_xticks(found["power"], ticks)
    axes.set_xlabel("power k of the Gram matrix")
    axes.set_ylabel("test mean squared error after 5 steps")
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    with matplotlib.rc_context(STYLE):
        picture = draw()
    (folder / "gramian-powers.png").write_bytes(save(picture, "png"))
