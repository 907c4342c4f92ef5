"""The figures of a study: learning curves, adaptation to a sine, and how far the tasks agreed."""

from collections.abc import Mapping
from io import BytesIO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradagree_opt.ablation.models import Params, initial_params, predict
from gradagree_opt.ablation.problem import Problem, Tasks, adapt, evaluation_tasks
from gradagree_opt.ablation.records import RunRecord
from gradagree_opt.ablation.sweep import Results
from gradagree_opt.ablation.tables import steps_text

SHOWN_STEPS = 5
AGREEMENT = {
    "smallest_weight": "smallest weight",
    "negative_share": "share of negative weights",
    "cancellation": "cancellation ‖Σg‖ / Σ‖g‖",
}


def learning_curves(results: Results) -> Figure:
    """Validation loss through training: mean over seeds, band from lowest to highest."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(results.rates):
        records = whole(results.final(name))
        if not records:
            continue
        at = [point.iteration for point in records[0].curve]
        losses = np.array([[point.loss for point in record.curve] for record in records])
        label = f"{name} ({results.rates[name]:g})"
        axes.plot(at, losses.mean(0), color=f"C{index}", label=label)
        axes.fill_between(at, losses.min(0), losses.max(0), color=f"C{index}", alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.set_xlabel("outer steps")
    axes.set_ylabel(f"validation loss after {results.study.tuning.steps} gradient steps")
    legend(axes, "method (outer rate)")
    return figure


def agreement(results: Results) -> Figure:
    """Weights and cancellation of the training batches, averaged over seeds."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, len(AGREEMENT))
    for axes, (entry, label) in zip(panels, AGREEMENT.items(), strict=True):
        for index, name in enumerate(results.rates):
            records = whole(results.final(name))
            if not records:
                continue
            points = [record.curve[1:] for record in records]
            values = [[point.diagnostics.get(entry, np.nan) for point in curve] for curve in points]
            at = [point.iteration for point in points[0]]
            axes.plot(at, np.mean(values, 0), color=f"C{index}", label=name, lw=1)
        axes.set_xlabel("outer steps")
        axes.set_ylabel(label)
    legend(panels[-1], "method")
    return figure


def adaptation(results: Results, problem: Problem, trained: Mapping[str, Params]) -> Figure:
    """One unseen sine: truth, support points, and predictions after 0 to 5 steps.

    Args:
        trained: The parameters of each method's first seed, by the method's name.
    """
    study, seed = results.study, results.study.seeds[0]
    tasks = evaluation_tasks(problem, 1, "test", seed)
    panels = {"before training": initial_params(study, seed), **trained}
    columns = min(5, len(panels))
    figure = Figure(figsize=(3 * columns, 2.6 * -(-len(panels) // columns)), layout="constrained")
    grid = figure.subplots(
        -(-len(panels) // columns), columns, sharex=True, sharey=True, squeeze=False
    )
    for axes, (name, params) in zip(grid.flat, panels.items(), strict=False):
        draw_adaptation(axes, problem, params, tasks)
        axes.set_title(name, fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def draw_adaptation(axes: Axes, problem: Problem, params: Params, tasks: Tasks) -> None:
    x, y = (part[0, :, 0].numpy() for part in tasks["query"])
    axes.plot(x, y, color="black", label="truth")
    adapted = {name: leaf.detach()[None] for name, leaf in params.items()}
    for step in range(SHOWN_STEPS + 1):
        if step:
            adapted = adapt(problem, adapted, tasks["support"], 1)
        one = {name: leaf[0] for name, leaf in adapted.items()}
        with torch.no_grad():
            prediction = predict(problem.module, one, tasks["query"][0][0])
        shade = 0.25 + 0.75 * step / SHOWN_STEPS
        axes.plot(
            x, prediction[:, 0].numpy(), color="C0", alpha=shade, lw=1, label=steps_text(step)
        )
    axes.plot(
        *(part[0, :, 0].numpy() for part in tasks["support"]), "o", color="C3", ms=4, label="points"
    )


def whole(records: list[RunRecord]) -> list[RunRecord]:
    """The runs that did not diverge."""
    longest = max(len(record.curve) for record in records)
    return [r for r in records if len(r.curve) == longest and np.isfinite(r.validation)]


def legend(axes: Axes, title: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title=title, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))


def png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
