"""The figures: what their lines show, against the records, and that everyone can read them."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from scipy import stats

from gradagree_opt.ablation.report import figures
from gradagree_opt.ablation.report.figure_matrices import agreement_matrices
from gradagree_opt.ablation.report.style import COLOURS, INK, looks, save
from gradagree_opt.ablation.runs.store import read_config, read_results
from gradagree_opt.ablation.runs.sweep import Label, Part
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import CurvePoint, Run, RunRecord

NAMES = ["mean", "agreement", "random_weights & co"]
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISIONS = {
    "usual": np.eye(3),
    "no red cones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green cones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue cones": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.fixture(scope="module")
def results(finished: Path) -> Part:
    [results] = read_results(finished, read_config(finished))
    return results


def changed(results: Part, records: dict[Label, RunRecord]) -> Part:
    return Part(results.study, results.records | records, results.rates)


def diverged(record: RunRecord) -> RunRecord:
    test = dict.fromkeys(record.test, math.inf)
    update = {"validation": math.inf, "test": test, "curve": record.curve[:2]}
    return record.model_copy(update=update)


def line(axes: Axes, label: str) -> Line2D:
    return next(x for x in axes.get_lines() if str(x.get_label()).startswith(label))


def data(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def test_learning_curves_are_means_over_seeds_with_students_interval(results: Part) -> None:
    axes = figures.learning_curves(results).axes[0]
    assert axes.get_yscale() == "log"
    for name, band in zip(NAMES, axes.collections, strict=True):
        curves = [[point.loss for point in r.curve] for r in results.final(name)]
        at, means = data(line(axes, f"{name} ({results.rates[name]:g})"))
        assert at == list(range(6))
        assert means == pytest.approx(np.mean(curves, 0).tolist())
        expected = stats.ttest_1samp(curves, 0).confidence_interval(0.95)
        corners = band.get_paths()[0].vertices
        for index, step in enumerate(at):
            found = np.asarray(corners)[np.asarray(corners)[:, 0] == step][:, 1]
            assert found.min() == pytest.approx(expected.low[index])
            assert found.max() == pytest.approx(expected.high[index])


def test_the_curves_by_time_are_those_by_steps_as_long_as_the_runs_took_in_the_mean(
    results: Part,
) -> None:
    took = {3: 10.0, 5: 20.0}  # for five steps
    records = {
        label: record.model_copy(update={"seconds": took[record.run.seed]})
        for label, record in results.records.items()
    }
    by_steps = figures.learning_curves(results).axes[0]
    by_time = figures.seconds(changed(results, records)).axes[0]
    assert by_time.get_xlabel() == "seconds"
    for name in NAMES:
        (steps, losses), (seconds, same) = (data(line(axes, name)) for axes in (by_steps, by_time))
        assert seconds == pytest.approx([3 * step for step in steps]) and same == losses


def test_a_seed_that_diverged_is_left_out_of_the_curve_and_said_so(results: Part) -> None:
    first, second = results.final("mean")
    axes = figures.learning_curves(changed(results, {first.run.label: diverged(first)})).axes[0]
    shown = line(axes, "mean (")
    assert "1 of 2 seeds diverged" in str(shown.get_label())
    assert data(shown)[1] == [point.loss for point in second.curve]
    assert len(axes.collections) == 2  # one seed has no interval


def test_losses_below_zero_are_drawn_on_a_linear_axis(results: Part) -> None:
    records = {}
    for label, record in results.records.items():
        curve = [point.model_copy(update={"loss": -point.loss}) for point in record.curve]
        records[label] = record.model_copy(update={"curve": curve})
    axes = figures.learning_curves(changed(results, records)).axes[0]
    above = figures.learning_curves(results).axes[0]
    assert axes.get_yscale() == "linear"
    for name in NAMES:
        assert data(line(axes, name))[1] == [-loss for loss in data(line(above, name))[1]]


def test_rate_curves_show_every_candidate_and_ring_the_chosen_one(results: Part) -> None:
    left, right = figures.tuned_rates(results).axes
    assert left.get_xscale() == right.get_xscale() == "log"
    for name in NAMES:
        runs = [results.records[name, rate, 3] for rate in (0.25, 0.5)]
        losses, scores = [r.validation for r in runs], [r.test[1] for r in runs]
        assert data(line(left, name)) == ([0.25, 0.5], losses)
        assert data(line(right, name)) == ([0.25, 0.5], scores)
        best = losses.index(min(losses))
        for axes, values in ((left, losses), (right, scores)):
            rings = [data(x) for x in axes.get_lines() if x.get_markerfacecolor() == "none"]
            assert ([0.25, 0.5][best : best + 1], values[best : best + 1]) in rings


def test_candidates_are_numbered_but_for_those_too_near_to_another(study: Study) -> None:
    def numbered(rates: list[float]) -> list[str]:
        outer = study.outer.model_copy(update={"rates": rates})
        one = study.model_copy(update={"outer": outer, "methods": study.methods[:1]})
        point = CurvePoint(iteration=0, loss=1.0, diagnostics={})
        runs = [Run(method=study.methods[0], rate=rate, seed=3) for rate in rates]
        records = {
            run.label: RunRecord(run=run, validation=1.0, test={1: 1.0}, curve=[point], seconds=1.0)
            for run in runs
        }
        axes = figures.tuned_rates(Part(one, records, {"mean": rates[0]})).axes[0]
        return [label.get_text() for label in axes.get_xticklabels()]

    assert numbered([0.5]) == ["0.5"]
    assert numbered([0.25, 0.5, 1.0, 2.0, 4.0]) == ["0.25", "0.5", "1", "2", "4"]
    assert numbered([0.001, 0.003, 0.01, 0.027, 0.03, 0.09, 0.1, 0.3, 1.0]) == (
        ["0.001", "0.003", "0.01", "0.027", "0.09", "0.3", "1"]
    )


def test_a_rate_at_which_a_method_diverges_is_a_gap_and_a_cross_above_the_axes(
    results: Part,
) -> None:
    label = ("agreement", 0.5, 3)
    record = results.records[label]
    for axes in figures.tuned_rates(changed(results, {label: diverged(record)})).axes:
        shown, look = line(axes, "agreement"), looks(results.study)["agreement"]
        assert math.isnan(data(shown)[1][1]) and math.isfinite(data(shown)[1][0])
        crosses = [x for x in axes.get_lines() if x.get_marker() == "x" and data(x)[1]]
        assert [x.get_color() for x in crosses] == [look.color]
        at, height = data(crosses[0])
        assert at == pytest.approx([0.5], rel=0.3) and height[0] > 1


def test_agreement_shows_the_mean_of_every_diagnostic_that_was_measured(results: Part) -> None:
    figure = figures.agreement(results)
    assert [axes.get_ylabel() for axes in figure.axes] == list(figures.AGREEMENT.values())
    for axes, entry in zip(figure.axes, figures.AGREEMENT, strict=True):
        records = results.final("agreement")
        nan = math.nan
        values = [[p.diagnostics.get(entry, nan) for p in r.curve[1:]] for r in records]
        expected = pytest.approx(np.mean(values, 0).tolist(), nan_ok=True)
        assert data(line(axes, "agreement")) == (list(range(1, 6)), expected)


def test_a_diagnostic_that_no_run_measured_has_no_panel(results: Part) -> None:
    def without(record: RunRecord) -> RunRecord:
        curve = [p.model_copy(update={"diagnostics": {"cancellation": 0.5}}) for p in record.curve]
        return record.model_copy(update={"curve": curve})

    records = {label: without(record) for label, record in results.records.items()}
    figure = figures.agreement(changed(results, records))
    assert [axes.get_ylabel() for axes in figure.axes] == [figures.AGREEMENT["cancellation"]]


def with_matrices(results: Part, matrices: dict[str, list[list[float]] | None]) -> Part:
    records = {}
    for name, matrix in matrices.items():
        for record in results.final(name):
            records[record.run.label] = record.model_copy(update={"agreement": matrix})
    return changed(results, records)


def test_agreement_matrices_show_the_cosines_of_the_first_seed_on_a_fixed_scale(
    results: Part,
) -> None:
    figure = agreement_matrices(results)
    assert figure is not None
    *panels, bar = figure.axes
    for axes, name in zip(panels, NAMES, strict=True):
        [cells] = axes.collections
        first = results.records[name, results.rates[name], 3]
        assert first.agreement is not None and axes.get_title().replace("\n", " ") == name
        assert np.asarray(cells.get_array()).tolist() == first.agreement
        assert cells.get_clim() == (-1, 1)
        ends = [cells.to_rgba([value])[0, :3] for value in (-1, 0, 1)]
        assert min(ends[1]) > 0.95  # nothing in common is near to white
        assert np.linalg.norm(ends[0] - ends[2]) > 0.5
        low, high = axes.get_ylim()
        assert low > high  # the first task on top, as a matrix is written
    assert bar.get_ylabel() == "cosine" and bar.get_ylim() == (-1, 1)


def test_a_method_without_a_matrix_has_no_panel_and_without_any_there_is_no_figure(
    results: Part,
) -> None:
    figure = agreement_matrices(with_matrices(results, {"agreement": None}))
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes[:-1]] == ["mean", "random_weights &\nco"]
    assert agreement_matrices(with_matrices(results, dict.fromkeys(NAMES))) is None


def test_panels_of_many_methods_stand_in_rows_that_need_not_be_full(results: Part) -> None:
    names = [str(number) for number in range(7)]
    methods = [Method(name=name, aggregator="mean") for name in names]
    study = results.study.model_copy(update={"methods": methods, "baseline": "0"})
    final = results.final("mean")
    records = {(name, 0.5, record.run.seed): record for name in names for record in final}
    figure = agreement_matrices(Part(study, records, dict.fromkeys(names, 0.5)))
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes[:-1]] == names
    assert save(figure, "png").startswith(b"\x89PNG")


def test_a_method_looks_the_same_in_every_figure(results: Part) -> None:
    for figure in (
        figures.learning_curves(results),
        figures.seconds(results),
        figures.tuned_rates(results),
        figures.agreement(results),
    ):
        for axes, (name, look) in itertools.product(figure.axes, looks(results.study).items()):
            shown = line(axes, name)
            assert (shown.get_color(), shown.get_marker(), shown.get_linestyle()) == look


def test_many_methods_look_different_and_the_baseline_is_black(study: Study) -> None:
    methods = [Method(name=str(number), aggregator="mean") for number in range(20)]
    look = looks(study.model_copy(update={"methods": methods, "baseline": "7"}))
    assert list(look) == [method.name for method in methods]
    assert look["7"].color == INK
    assert len(set(look.values())) == 20


@pytest.mark.parametrize("vision", VISIONS)
def test_the_colours_differ_with_every_kind_of_colour_vision(vision: str) -> None:
    seen = [lab(np.asarray(VISIONS[vision]) @ linear(colour)) for colour in (INK, *COLOURS)]
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(one - other) > 10  # about 2 can just be seen


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB, D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ rgb.clip(0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_equal_results_give_equal_files(results: Part, kind: str) -> None:
    first, second = (save(figures.tuned_rates(results), kind) for _ in range(2))
    assert first == second
