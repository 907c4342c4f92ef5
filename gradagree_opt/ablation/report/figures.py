"""The figures of every study: learning curves, what each outer rate gives, and agreement."""

import math
from collections.abc import Callable
from statistics import mean
from textwrap import fill
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gradagree_opt.ablation.report.significance import Interval, interval
from gradagree_opt.ablation.report.style import INK, legend, looks, plain_log
from gradagree_opt.ablation.report.tables import after
from gradagree_opt.ablation.runs.sweep import Part
from gradagree_opt.ablation.training.run import RunRecord

RateArray: TypeAlias = npt.NDArray[np.float64]
RateCurves: TypeAlias = dict[str, list[Interval]]
AGREEMENT = {
    "smallest_weight": "smallest weight",
    "negative_share": "share of negative weights",
    "effective_tasks": "effective number of tasks",
    "cancellation": "cancellation ‖Σg‖ / Σ‖g‖",
    "update_to_mean": "‖update‖ / ‖mean‖",
    "norm_correlation": "correlation of weight and ‖g‖²",
}
LIMITS = {"cancellation": (0.0, 1.0), "norm_correlation": (-1.05, 1.05)}
HOPELESS = 10  # times the loss before training is off the scale


def learning_curves(results: Part) -> Figure:
    """Validation loss through training: mean over seeds and its 95 % interval."""
    return loss_curves(results, "outer steps", lambda _: 1.0)


def seconds(results: Part) -> Figure:
    """The same by time: each method's outer steps in seconds, as its runs took in the mean."""

    def of_a_step(records: list[RunRecord]) -> float:
        return mean(record.seconds for record in records) / results.study.iterations

    return loss_curves(results, "seconds", of_a_step)


def loss_curves(results: Part, unit: str, of_a_step: Callable[[list[RunRecord]], float]) -> Figure:
    """Validation loss by outer steps, in units of which a step of a method's runs takes some."""
    figure = Figure(figsize=(7.2, 3.8))
    axes = figure.subplots()
    untrained = untrained_loss(results)
    seen = [untrained]
    for index, (name, look) in enumerate(looks(results.study).items()):
        records = results.final(name)
        kept = whole(records)
        if not kept:
            continue
        at = [point.iteration * of_a_step(kept) for point in kept[0].curve]
        losses = np.array([[point.loss for point in record.curve] for record in kept])
        seen += losses.ravel().tolist()
        means, halves = np.array([interval(column) for column in losses.T.tolist()]).T
        label = f"{name} ({results.rates[name]:g})"
        if len(kept) < len(records):
            label += f",\n{len(records) - len(kept)} of {len(records)} seeds diverged"
        every = max(1, len(at) // 5)
        axes.plot(at, means, label=label, markevery=(index % every, every), **look._asdict())
        if len(kept) > 1:
            axes.fill_between(
                at, means - halves, means + halves, color=look.color, alpha=0.15, lw=0
            )
    # The limits are by the losses: an interval may reach below zero, where a log axis does not go.
    plain_log(axes, [loss for loss in seen if loss < HOPELESS * untrained])
    axes.set_xlabel(unit)
    axes.set_ylabel(f"validation loss{after(results.study, results.study.tuning.steps)}")
    legend(figure, axes, "method (outer rate)", "outside right upper")
    return figure


def tuned_rates(results: Part) -> Figure:
    """What each method reaches at every candidate outer rate, the chosen one ringed.

    From the seeds that the rates are tuned on; the choice is by the left panel alone.
    """
    study = results.study
    measure, steps = study.tasks.measure, study.tuning.steps

    def curves(value: Callable[[RunRecord], float]) -> RateCurves:
        return {
            name: [
                interval([value(results.records[name, rate, seed]) for seed in study.tuning_seeds])
                for rate in results.candidates(name)
            ]
            for name in results.rates
        }

    figure = Figure(figsize=(7.2, 4.2))
    left, right = figure.subplots(1, 2)
    losses = curves(lambda record: record.validation)
    scores = curves(lambda record: record.test[steps] * measure.factor)
    draw_rates(left, results, losses, log=True)
    draw_rates(right, results, scores, log=not measure.higher_is_better)
    left.set_ylabel(f"validation loss{after(study, steps)}")
    right.set_ylabel(fill(f"test {measure.name}{after(study, steps)}", 40))
    left.plot([], [], "o", mec=INK, mfc="none", ms=9, label="chosen rate")
    left.plot([], [], "x", color=INK, label="diverged or off the scale")
    legend(figure, left, "method", "outside lower center", columns=3)
    return figure


def draw_rates(axes: Axes, results: Part, curves: RateCurves, *, log: bool) -> None:
    untrained = untrained_loss(results)
    limit = HOPELESS * untrained if log else math.inf
    every = sorted({rate for name in curves for rate in results.candidates(name)})
    spread = np.linspace(-0.3, 0.3, len(curves))  # of the way to the next rate
    step = (every[-1] / every[0]) ** (1 / (len(every) - 1)) if len(every) > 1 else 2.0
    for shift, (name, look) in zip(spread, looks(results.study).items(), strict=True):
        rates = np.array(results.candidates(name))
        means, halves = np.array(curves[name]).T
        gone = ~(means < limit)
        means[gone] = np.nan
        chosen = rates == results.rates[name]
        axes.plot(rates, means, label=name, **look._asdict())
        axes.fill_between(rates, means - halves, means + halves, color=look.color, alpha=0.15, lw=0)
        axes.plot(rates[chosen], means[chosen], "o", ms=9, mec=look.color, mfc="none")
        if gone.any():
            draw_diverged(axes, rates[gone] * step**shift, look.color)
    axes.set_xscale("log")
    axes.set_xlim(every[0] / step**0.4, every[-1] * step**0.4)
    ticks = every[:1]
    for rate in every:  # those that have room for their number
        if rate / ticks[-1] >= (every[-1] / every[0]) ** 0.14 > 1:
            ticks.append(rate)
    axes.set_xticks(ticks, [f"{rate:.4g}" for rate in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("outer rate")
    if log:
        shown = [v.mean for curve in curves.values() for v in curve if v.mean < limit]
        plain_log(axes, shown or [untrained])


def draw_diverged(axes: Axes, rates: RateArray, color: str) -> None:
    """A cross above the axes for each rate."""
    height = np.full(len(rates), 1.03)
    above = axes.get_xaxis_transform()
    axes.plot(rates, height, "x", color=color, transform=above, clip_on=False)


def agreement(results: Part) -> Figure:
    """Weights and cancellation of the training batches, averaged over seeds.

    What no run has measured is left out.
    """
    measured = {
        entry
        for name in results.rates
        for record in whole(results.final(name))
        for point in record.curve
        for entry in point.diagnostics
    }
    shown = {entry: label for entry, label in AGREEMENT.items() if entry in measured}
    rows = max(1, -(-len(shown) // 3))
    figure = Figure(figsize=(8, 2.1 * rows + 0.8))
    panels = figure.subplots(rows, 3, sharex=True, squeeze=False)
    for axes, (entry, label) in zip(panels.flat, shown.items(), strict=False):
        draw_diagnostic(axes, results, entry)
        axes.set_ylabel(label)
        axes.set_ylim(*LIMITS.get(entry, axes.get_ylim()))
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    for axes in panels.flat[max(0, len(shown) - 3) : len(shown)]:
        axes.set_xlabel("outer steps")
        axes.tick_params(labelbottom=True)
    legend(figure, panels[0, 0], "method", "outside lower center", columns=4)
    return figure


def draw_diagnostic(axes: Axes, results: Part, entry: str) -> None:
    for index, (name, look) in enumerate(looks(results.study).items()):
        curves = [record.curve[1:] for record in whole(results.final(name))]
        if not curves:
            continue
        values = [[point.diagnostics.get(entry, np.nan) for point in curve] for curve in curves]
        at = [point.iteration for point in curves[0]]
        every = max(1, len(at) // 4)
        axes.plot(
            at,
            np.mean(values, 0),
            label=name,
            markevery=(index % every, every),
            lw=1,
            **look._asdict(),
        )


def untrained_loss(results: Part) -> float:
    """The largest validation loss before training, over the seeds."""
    return max(record.curve[0].loss for record in results.records.values())


def whole(records: list[RunRecord]) -> list[RunRecord]:
    """The runs that did not diverge."""
    longest = max(len(record.curve) for record in records)
    return [r for r in records if len(r.curve) == longest and np.isfinite(r.validation)]
