"""The figure of a sine study: one unseen task, before training and after each method."""

from collections.abc import Mapping
from textwrap import fill

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradagree_opt.ablation.report.style import COLOURS, INK
from gradagree_opt.ablation.report.tables import counted
from gradagree_opt.ablation.runs.sweep import Part
from gradagree_opt.ablation.training.grouping import select, stack
from gradagree_opt.ablation.training.networks import Params, initial_params, predict
from gradagree_opt.ablation.training.problem import Problem, Tasks, adapt, evaluation_tasks

SHOWN_STEPS = 5


def adaptation(results: Part, problem: Problem, trained: Mapping[str, Params]) -> Figure:
    """One unseen sine: truth, support points, and predictions after 0 to 5 steps.

    Args:
        trained: The parameters of each method's first seed, by the method's name.
    """
    study, seed = results.study, results.study.seeds[0]
    tasks = evaluation_tasks(problem, 1, "test", seed)
    panels = {"before training": initial_params(study, seed), **trained}
    columns = min(5, len(panels))
    figure = Figure(figsize=(2 * columns, 1.9 * -(-len(panels) // columns)))
    grid = figure.subplots(
        -(-len(panels) // columns), columns, sharex=True, sharey=True, squeeze=False
    )
    for axes, (name, params) in zip(grid.flat, panels.items(), strict=False):
        draw_adaptation(axes, problem, params, tasks)
        axes.set_title(fill(name, 20))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_adaptation(axes: Axes, problem: Problem, params: Params, tasks: Tasks) -> None:
    x, y = (part[0, :, 0].numpy() for part in tasks["query"])
    axes.plot(x, y, color=INK, label="truth")
    adapted = stack([params])
    for step in range(SHOWN_STEPS + 1):
        if step:
            adapted = adapt(problem, adapted, tasks["support"], 1)
        with torch.no_grad():
            prediction = predict(problem.module, select(adapted, 0), tasks["query"][0][0])
        shade = 0.25 + 0.75 * step / SHOWN_STEPS
        axes.plot(
            x,
            prediction[:, 0].numpy(),
            color=COLOURS[1],
            alpha=shade,
            lw=1,
            label=counted(step, "step"),
        )
    axes.plot(
        *(part[0, :, 0].numpy() for part in tasks["support"]),
        "o",
        color=COLOURS[0],
        ms=4,
        label="points",
    )
