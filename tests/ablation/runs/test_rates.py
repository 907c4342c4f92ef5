"""The outer rates that methods are tuned on: own ones, on own seeds, and beyond an edge."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradagree_opt.ablation.report import figures
from gradagree_opt.ablation.report.notes import notes
from gradagree_opt.ablation.runs import job as job_module
from gradagree_opt.ablation.runs.store import read_config, read_results
from gradagree_opt.ablation.runs.sweep import Label, Part, Sweep, number_of_runs
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import Params, initial_params
from gradagree_opt.ablation.training.problem import Problem
from gradagree_opt.ablation.training.run import CurvePoint, Run, RunRecord
from gradagree_testing.command import gradagree

from ..conftest import WriteStudy

Loss = Callable[[Run], float]
METHODS = [
    {"name": "mean", "aggregator": "mean"},
    {"name": "Adam", "aggregator": "mean", "outer": "adam", "rates": [0.01, 0.001]},
]
TUNING = {"tasks": 10, "steps": 1}


class Pretended:
    """Runs that are not trained, whose validation loss is a function of the run."""

    def __init__(self) -> None:
        self.done: list[Label] = []
        self.loss: Loss = lambda run: run.rate

    def train_runs(
        self, study: Study, _: Problem, runs: list[Run], report: Callable[[int], None], *__: object
    ) -> list[tuple[RunRecord, Params]]:
        self.done += [run.label for run in runs]
        report(study.iterations * len(runs))
        return [(self.record(study, run), initial_params(study, run.seed)) for run in runs]

    def record(self, study: Study, run: Run) -> RunRecord:
        losses = {0: 1.0, study.iterations: self.loss(run)}
        return RunRecord(
            run=run,
            validation=self.loss(run),
            test=dict.fromkeys(study.test.steps, 1 + run.rate),
            curve=[CurvePoint(iteration=n, loss=x, diagnostics={}) for n, x in losses.items()],
            seconds=0.5,
        )


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    runs = Pretended()
    monkeypatch.setattr(job_module, "train_runs", runs.train_runs)
    return runs


def extending(study: Study, extend: int) -> Study:
    outer = study.outer.model_copy(update={"extend": extend})
    return study.model_copy(update={"outer": outer, "methods": study.methods[:1]})


def sweep(study: Study, folder: Path) -> Part:
    return Sweep(study, folder, None, pytest.fail).run(1, lambda _: None)


def near(optimum: float) -> Loss:
    """The lowest at the optimum, and higher the further the rate is from it in powers of two."""
    return lambda run: abs(math.log2(run.rate / optimum))


def until(limit: float) -> Loss:
    """Lower for larger rates, up to where the method diverges."""
    return lambda run: 1 / run.rate if run.rate <= limit else math.inf


@pytest.mark.parametrize(
    ("loss", "extend", "tried", "chosen", "at_edge"),
    [
        (near(2.0), 0, [0.25, 0.5], 0.5, True),
        (near(2.0), 1, [0.25, 0.5, 1.0], 1.0, True),
        (near(2.0), 3, [0.25, 0.5, 1.0, 2.0, 4.0], 2.0, False),
        (near(2.0), 9, [0.25, 0.5, 1.0, 2.0, 4.0], 2.0, False),
        (near(0.01), 2, [0.0625, 0.125, 0.25, 0.5], 0.0625, True),
        (until(0.6), 1, [0.25, 0.5, 1.0], 0.5, False),
        (until(0.0), 2, [0.0625, 0.125, 0.25, 0.5], 0.0625, True),
    ],
)
def test_rates_beyond_an_edge_are_tried_while_the_best_is_there(
    study: Study,
    tmp_path: Path,
    pretended: Pretended,
    loss: Loss,
    extend: int,
    tried: list[float],
    chosen: float,
    at_edge: bool,
) -> None:
    pretended.loss = loss
    study = extending(study, extend)
    results = sweep(study, tmp_path)
    assert results.candidates("mean") == tried and results.rates == {"mean": chosen}
    assert results.at_edge("mean") == at_edge
    expected = [("mean", rate, 3) for rate in tried] + [("mean", chosen, 5)]
    assert sorted(pretended.done) == sorted(expected)


def test_a_rate_beyond_is_further_by_the_ratio_of_the_last_two_there(
    study: Study, tmp_path: Path, pretended: Pretended
) -> None:
    outer = study.outer.model_copy(update={"rates": [0.3, 0.01, 0.1]})
    study = extending(study.model_copy(update={"outer": outer}), 2)
    pretended.loss = near(100.0)
    assert sweep(study, tmp_path / "up").candidates("mean") == [0.01, 0.1, 0.3, 0.9, 2.7]
    pretended.loss = near(1e-9)
    assert sweep(study, tmp_path / "down").candidates("mean") == [1e-4, 1e-3, 0.01, 0.1, 0.3]
    outer = study.outer.model_copy(update={"rates": [0.3, 0.1]})
    thirds = extending(study.model_copy(update={"outer": outer}), 2)
    assert sweep(thirds, tmp_path / "down").candidates("mean") == [0.01111, 0.03333, 0.1, 0.3]


@pytest.mark.parametrize(
    ("rates", "optimum"),
    [([1.0, 1.00001], 2.0), ([1e-200, 1e-190], 1e-250), ([1e190, 1e200], 1e250)],
)
def test_an_edge_beyond_which_four_digits_lead_nowhere_is_not_extended_and_no_run_is_missing(
    study: Study, tmp_path: Path, pretended: Pretended, rates: list[float], optimum: float
) -> None:
    outer = study.outer.model_copy(update={"rates": rates})
    study = extending(study.model_copy(update={"outer": outer}), 2)
    pretended.loss = near(optimum)
    results = sweep(study, tmp_path)
    assert results.candidates("mean") == rates
    assert len(results.records) == number_of_runs(study, results.records)


def test_every_method_is_extended_by_itself_as_far_as_the_others_may_be(
    study: Study, tmp_path: Path, pretended: Pretended
) -> None:
    optima = {"mean": 8.0, "agreement": 1.0, "random_weights & co": 0.3}
    pretended.loss = lambda run: near(optima[run.method.name])(run)
    outer = study.outer.model_copy(update={"extend": 2})
    study = study.model_copy(update={"outer": outer})
    steps: list[int] = []
    whole = Sweep(study, tmp_path, None, pytest.fail)
    results = whole.run(1, steps.append)
    assert {name: results.candidates(name) for name in optima} == {
        "mean": [0.25, 0.5, 1.0, 2.0],
        "agreement": [0.25, 0.5, 1.0, 2.0],
        "random_weights & co": [0.125, 0.25, 0.5],
    }
    assert [results.at_edge(name) for name in optima] == [True, False, False]
    assert len(pretended.done) == len(results.records) == number_of_runs(study, results.records)
    assert sum(steps) == whole.iterations == 5 * (4 + 4 + 3 + 3)


def test_a_study_goes_on_with_its_extension_and_does_nothing_twice(
    study: Study, tmp_path: Path, pretended: Pretended
) -> None:
    pretended.loss = near(2.0)
    sweep(extending(study, 1), tmp_path)
    pretended.done.clear()
    further = sweep(extending(study, 2), tmp_path)
    assert pretended.done == [("mean", 2.0, 3), ("mean", 2.0, 5)]
    pretended.done.clear()
    assert sweep(extending(study, 2), tmp_path) == further and pretended.done == []
    lost = further.records["mean", 0.25, 3].run.key(study, None)
    (tmp_path / "runs" / f"{lost}.json").unlink()
    assert sweep(extending(study, 2), tmp_path) == further
    assert pretended.done == [("mean", 0.25, 3)]


def test_a_method_is_tuned_on_its_own_rates_and_run_at_the_best_of_them(
    write_study: WriteStudy, tmp_path: Path, pretended: Pretended
) -> None:
    study = load(str(write_study(methods=METHODS)))
    results = sweep(study, tmp_path)
    assert set(pretended.done) == {
        *(("mean", rate, 3) for rate in (0.25, 0.5)),
        *(("Adam", rate, 3) for rate in (0.01, 0.001)),
        ("mean", 0.25, 5),
        ("Adam", 0.001, 5),
    }
    assert results.rates == {"mean": 0.25, "Adam": 0.001}
    assert results.at_edge("Adam") and results.candidates("Adam") == [0.001, 0.01]
    for axes, value in zip(
        figures.tuned_rates(results).axes,
        (lambda rate: rate, lambda rate: 1 + rate),
        strict=True,
    ):
        for name, rates in (("mean", [0.25, 0.5]), ("Adam", [0.001, 0.01])):
            line = next(line for line in axes.get_lines() if line.get_label() == name)
            assert np.asarray(line.get_xdata()).tolist() == rates
            assert line.get_ydata() == pytest.approx([value(rate) for rate in rates])
    assert 'chosen from 0.25, 0.5 ("Adam": 0.01, 0.001) by the loss' in notes([results])[1]
    assert 'Outer optimizer sgd; adam for "Adam".' in notes([results])[1]


def test_rates_are_chosen_on_seeds_of_their_own_which_the_table_does_not_have(
    write_study: WriteStudy, tmp_path: Path, pretended: Pretended
) -> None:
    study = load(str(write_study(tuning=TUNING | {"seeds": [8, 7, 9]})))
    pretended.loss = lambda run: near(0.5 if run.seed > 5 else 0.25)(run)
    results = sweep(study, tmp_path)
    for name in results.rates:
        found = [(rate, seed) for method, rate, seed in pretended.done if method == name]
        tuning = [(rate, seed) for rate in (0.25, 0.5) for seed in (7, 8, 9)]
        assert sorted(found) == sorted([*tuning, (0.5, 3), (0.5, 5)])
        assert [record.run.seed for record in results.final(name)] == [3, 5]
    assert number_of_runs(study, results.records) == len(pretended.done)
    assert "10 validation tasks, 3 seeds of their own; 5 " in notes([results])[1]


@pytest.mark.usefixtures("without_pictures")
def test_what_is_reported_of_such_a_study_is_made_again_from_its_records(
    write_study: WriteStudy, tmp_path: Path, pretended: Pretended
) -> None:
    pretended.loss = near(8e-4)
    outer = {"optimizer": "sgd", "rates": [0.25, 0.5], "extend": 2}
    path = write_study(methods=METHODS, tuning=TUNING | {"seeds": [7, 8]}, outer=outer)
    out = tmp_path / "out"
    done = gradagree("ablate", path, "--out", out, "--jobs", 1)
    assert done.exit_code == 0 and " 100 % " in done.stderr
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    pretended.done.clear()
    assert gradagree("report", out).exit_code == 0 and pretended.done == []
    assert before == {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    config = read_config(out)
    [results] = read_results(out, config)
    assert results.candidates("Adam") == [1e-4, 1e-3, 0.01]
    assert results.candidates("mean") == [0.0625, 0.125, 0.25, 0.5]
    text = (out / "methods.md").read_text()
    assert 'from 0.25, 0.5 ("Adam": 0.01, 0.001), extended by up to 2 rates where the' in text
    assert "10 validation tasks, with 2 seeds of their own; no test task" in text
    lost = results.records["Adam", 1e-4, 8].run.key(config.study, None)
    (out / "runs" / f"{lost}.json").unlink()
    assert "3 of 18 runs" in gradagree("report", out).stderr  # its final ones are not known then
