"""Draws the error over the number of tasks in a batch, from the recorded studies.

    python docs/figures/tasks_per_batch.py [FOLDER]

writes tasks-per-batch.png into the folder, by default the script's own.
"""

import sys
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from gradagree_opt.ablation.report.style import COLOURS, INK, STYLE, legend, plain_log, save

RESULTS = Path(__file__).parents[1] / "results"
STUDIES = {
    2: "tasks-per-batch-2",
    5: "tasks-per-batch-5",
    10: "tasks-per-batch",
    25: "tasks-per-batch-25",
    50: "tasks-per-batch-50",
}
METHODS = {
    "mean": INK,
    "mean at equal agreement's length": COLOURS[2],
    "equal agreement": COLOURS[1],
}


def draw() -> Figure:
    tables = [pd.read_csv(RESULTS / name / "table.csv") for name in STUDIES.values()]
    rows = pd.concat([table.set_index("method") for table in tables])
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    for method, colour in METHODS.items():
        error, half = rows.loc[method, "mean_5_steps"], rows.loc[method, "half_width_5_steps"]
        axes.errorbar(list(STUDIES), error, half, color=colour, marker="o", label=method)
    plain_log(axes, rows.loc[list(METHODS), "mean_5_steps"].tolist())
    axes.set_xscale("log")
    axes.set_xticks(list(STUDIES), [str(n) for n in STUDIES], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tasks in a batch")
    axes.set_ylabel("test mean squared error after 5 steps")
    legend(figure, axes, "", "outside lower center", columns=3)
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    with matplotlib.rc_context(STYLE):
        picture = draw()
    (folder / "tasks-per-batch.png").write_bytes(save(picture, "png"))
