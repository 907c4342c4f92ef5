"""The figure of a study at several fractions of corrupted tasks: which method bears how much."""

import math
from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from gradagree_opt.ablation.report.figures import HOPELESS, draw_diverged, untrained_loss
from gradagree_opt.ablation.report.significance import interval
from gradagree_opt.ablation.report.style import legend, looks, plain_log
from gradagree_opt.ablation.report.tables import counted, fractions, scores
from gradagree_opt.ablation.runs.sweep import Part


def corruption(parts: Sequence[Part]) -> Figure:
    """Test score by fraction of corrupted tasks: mean over seeds and its 95 % interval.

    After the steps that rates are tuned for, each method at the rate chosen at that fraction.
    """
    study, at = parts[0].study, np.array(fractions(parts))
    measure, steps = study.tasks.measure, study.tuning.steps
    limit = math.inf if measure.higher_is_better else HOPELESS * untrained_loss(parts[0])
    figure = Figure(figsize=(7.2, 4.2))
    axes = figure.subplots()
    seen = []
    # Side by side, so that no interval hides another.
    shifts = np.linspace(-0.015, 0.015, len(study.methods)) * (at[-1] - at[0])
    for shift, (name, look) in zip(shifts, looks(study).items(), strict=True):
        tested = [list(scores(part.final(name), steps).values()) for part in parts]
        means, halves = np.array([interval(values).scaled(measure.factor) for values in tested]).T
        gone = ~(means < limit)
        means[gone] = np.nan
        seen += means[~gone].tolist()
        axes.plot(at + shift, means, label=name, **look._asdict())
        axes.errorbar(at + shift, means, halves, fmt="none", ecolor=look.color, elinewidth=1)
        if gone.any():
            draw_diverged(axes, at[gone] + shift, look.color)
    if not measure.higher_is_better:
        plain_log(axes, seen)
    axes.set_xticks(at, [f"{100 * fraction:g}" for fraction in at])
    axes.set_xlabel("corrupted training tasks in %")
    axes.set_ylabel(fill(f"test {measure.name} after {counted(steps, 'step')}", 40))
    legend(figure, axes, "method", "outside right upper")
    return figure
