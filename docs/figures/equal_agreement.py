"""Draws two tasks and the steps that three methods take for them.

    python docs/figures/equal_agreement.py [FOLDER]

writes equal-agreement.png into the folder, by default the script's own.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

import gradagree_opt as ga
from gradagree_opt.ablation.report.style import COLOURS, INK, STYLE, save

TASKS = torch.tensor([[3.0, 0.3], [0.45, 0.9]])
STEPS = {
    "mean": (ga.Mean(), INK),
    "Gradient Agreement": (ga.GradientAgreement(), COLOURS[0]),
    "Equal Agreement": (ga.EqualAgreement(), COLOURS[1]),
}


def draw() -> Figure:
    """Each arrow is what the library returns for the two grey ones."""
    figure = Figure(figsize=(6.4, 2.9))
    axes = figure.subplots()
    for index, task in enumerate(TASKS, 1):
        arrow(axes, task, "0.6", 1.5)
        axes.annotate(
            f"task {index}", task.tolist(), color="0.4", xytext=(4, 2), textcoords="offset points"
        )
    for name, (aggregator, colour) in STEPS.items():
        result = aggregator.aggregate(TASKS)
        cosines = torch.cosine_similarity(result.update.expand(2, 2), TASKS)
        arrow(axes, result.update, colour, 2.5)
        label = f"{name}: cosines with the tasks {cosines[0]:.2f} and {cosines[1]:.2f}"
        axes.plot([], [], color=colour, label=label)
    axes.set_xlim(-0.1, 3.6)
    axes.set_ylim(-0.1, 1.7)
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.legend(loc="outside lower center")
    return figure


def arrow(axes: matplotlib.axes.Axes, to: torch.Tensor, colour: str, width: float) -> None:
    axes.annotate(
        "",
        to.tolist(),
        (0, 0),
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": width,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    with matplotlib.rc_context(STYLE):
        picture = draw()
    (folder / "equal-agreement.png").write_bytes(save(picture, "png"))
