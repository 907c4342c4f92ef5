"""The plan of a study: tuning on validation alone, final runs, resuming, and processes."""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from gradagree_opt.ablation.runs import engines
from gradagree_opt.ablation.runs import job as job_module
from gradagree_opt.ablation.runs.job import Found
from gradagree_opt.ablation.runs.processes import Processes, ThisProcess
from gradagree_opt.ablation.runs.sweep import (
    Label,
    Part,
    Sweep,
    choose_rates,
    final_runs,
    tuning_runs,
)
from gradagree_opt.ablation.runs.workers import Workers, execute
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import CurvePoint, Run, RunRecord
from gradagree_testing.jobs import Failing, Marking, task_of


def record(run: Run, validation: float, test: float = 0.0) -> RunRecord:
    point = CurvePoint(iteration=0, loss=validation, diagnostics={})
    return RunRecord(run=run, validation=validation, test={1: test}, curve=[point], seconds=0.0)


def ignore(_: object) -> None:
    pass


def without_seconds(results: Part) -> dict[Label, dict[str, object]]:
    return {label: r.model_dump(exclude={"seconds"}) for label, r in results.records.items()}


def submit(workers: Workers) -> Callable[[str], "Future[Any]"]:
    return lambda name: workers.submit(task_of(name))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Label]:
    """The runs that are really done in this process, as they are."""
    labels: list[Label] = []
    train_runs = job_module.train_runs

    def spy(*arguments: object) -> object:
        labels.extend(run.label for run in arguments[2])  # type: ignore[attr-defined]
        return train_runs(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(job_module, "train_runs", spy)
    return labels


def test_each_method_gets_the_rate_of_its_lowest_validation_loss(study: Study) -> None:
    losses = {"mean": {0.25: 1.0, 0.5: 2.0}, "agreement": {0.25: math.inf, 0.5: 3.0}}
    records = {
        run.label: record(run, losses.get(run.method.name, {}).get(run.rate, 7.0), test=-run.rate)
        for run in tuning_runs(study)
    }
    assert choose_rates(study, records) == {
        "mean": 0.25,
        "agreement": 0.5,
        "random_weights & co": 0.25,  # equal losses: the smallest candidate
    }


def test_the_choice_is_by_the_sum_over_the_tuning_seeds_alone(study: Study) -> None:
    tuning = study.tuning.model_copy(update={"seeds": 2})
    study = study.model_copy(update={"tuning": tuning, "seeds": [0, 1, 2]})
    table = {(0.25, 0): 1.0, (0.25, 1): 5.0, (0.5, 0): 2.0, (0.5, 1): 2.0}
    records = {run.label: record(run, table[run.rate, run.seed]) for run in tuning_runs(study)}
    assert set(choose_rates(study, records).values()) == {0.5}


def test_the_choice_does_not_look_at_test_scores(study: Study) -> None:
    def chosen(sign: int) -> dict[str, float]:
        return choose_rates(
            study,
            {run.label: record(run, run.rate, test=sign * run.rate) for run in tuning_runs(study)},
        )

    assert chosen(1) == chosen(-1) == dict.fromkeys(chosen(1), 0.25)


def test_a_rate_at_either_end_of_several_is_at_the_edge(study: Study) -> None:
    outer = study.outer.model_copy(update={"rates": [0.5, 0.25, 1.0]})
    names = [method.name for method in study.methods]
    chosen = dict(zip(names, (0.5, 0.25, 1.0), strict=True))
    results = Part(study.model_copy(update={"outer": outer}), {}, chosen)
    assert [results.at_edge(name) for name in names] == [False, True, True]
    only = study.outer.model_copy(update={"rates": [0.5]})
    single = Part(study.model_copy(update={"outer": only}), {}, dict.fromkeys(names, 0.5))
    assert not single.at_edge(names[0])


def test_every_method_has_the_same_number_of_tuning_and_final_runs(study: Study) -> None:
    rates = {method.name: 0.5 for method in study.methods}
    for runs, each in ((tuning_runs(study), 2), (final_runs(study, rates), 2)):
        names = [run.method.name for run in runs]
        assert {names.count(name) for name in rates} == {each}


def test_finished_runs_are_kept_when_a_study_grows_or_a_method_is_renamed(
    study: Study, tmp_path: Path, done: list[Label]
) -> None:
    steps: list[int] = []
    first = Sweep(study, tmp_path, None, ignore)
    before = first.run(1, steps.append)
    assert sum(steps) == first.iterations == 5 * 3 * (2 + 1)
    assert len(done) == 9

    done.clear()
    again = Sweep(study, tmp_path, None, ignore).run(1, ignore)
    assert done == []
    assert without_seconds(again) == without_seconds(before)

    average = Method(name="average", aggregator="mean")
    norms = Method(name="norms", aggregator="norm_share")
    grown = study.model_copy(
        update={"seeds": [3, 5, 7], "baseline": "average", "methods": [average, norms]}
    )
    after = Sweep(grown, tmp_path, None, ignore).run(1, ignore)
    assert [label for label in done if label[0] == "average"] == [
        ("average", before.rates["mean"], 7)
    ]
    assert after.rates["average"] == before.rates["mean"]
    kept = [r.test for r in after.final("average")][:2]
    assert kept == [r.test for r in before.final("mean")]


def test_a_record_that_was_cut_off_is_named_and_its_run_alone_done_again(
    study: Study, tmp_path: Path, done: list[Label]
) -> None:
    before = Sweep(study, tmp_path, None, ignore).run(1, ignore)
    run = tuning_runs(study)[4]
    path = tmp_path / "runs" / f"{run.key(study, None)}.json"
    path.write_bytes(path.read_bytes()[:100])
    done.clear()
    warnings: list[str] = []
    again = Sweep(study, tmp_path, None, warnings.append).run(1, ignore)
    assert done == [run.label]
    assert len(warnings) == 1 and str(path) in warnings[0] and "\n" not in warnings[0]
    assert without_seconds(again) == without_seconds(before)


@pytest.mark.parametrize(
    ("jobs", "sizes"), [(1, [2, 2, 2]), (3, [2, 2, 2]), (4, [2, 2, 2]), (6, [1] * 6)]
)
def test_more_processes_train_smaller_groups(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, sizes: list[int]
) -> None:
    found: list[list[Run]] = []

    def spy(_workers: object, tasks: list[list[Run]], *_: object) -> list[Found]:
        found.extend(tasks)
        return [[(record(run, 0.0), b"") for run in runs] for runs in tasks]

    monkeypatch.setattr(engines, "execute", spy)
    Sweep(study, tmp_path, None, ignore).complete(tuning_runs(study), jobs, ignore)
    assert [len(runs) for runs in found] == sizes


@pytest.mark.slow
def test_processes_give_what_one_process_gives(study: Study, tmp_path: Path) -> None:
    steps: list[int] = []
    alone = Sweep(study, tmp_path / "alone", None, ignore).run(1, ignore)
    sweep = Sweep(study, tmp_path / "two", None, ignore)
    assert without_seconds(sweep.run(2, steps.append)) == without_seconds(alone)
    assert sum(steps) == sweep.iterations
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_why_a_process_cannot_prepare_is_told_and_other_children_are_left_alone(jobs: int) -> None:
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    workers = ThisProcess(Failing(), ignore) if jobs == 1 else Processes(Failing(), jobs, ignore)
    try:
        with workers, pytest.raises(StudyError, match=r"^the data are gone$"):
            list(execute(workers, ["first", "second"], submit(workers), str))
        other.join(2)
        assert other.is_alive() and multiprocessing.active_children() == [other]
    finally:
        other.kill()
        other.join()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that kills")
def test_of_a_process_that_is_killed_its_group_alone_is_done_again(tmp_path: Path) -> None:
    with Processes(Marking(tmp_path), 2, ignore) as workers:
        found = set(execute(workers, ["first", "killed once", "last"], submit(workers), str))
    assert found == {"first", "killed once", "last"}
    marks = {path.name: len(path.read_text()) for path in tmp_path.iterdir()}
    assert marks == {"first": 1, "killed once": 2, "last": 1}
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that kills")
def test_a_process_that_is_killed_while_it_waits_is_replaced(tmp_path: Path) -> None:
    with Processes(Marking(tmp_path), 1, ignore) as workers:
        started = []
        for name in ("first", "second"):
            assert list(execute(workers, [name], submit(workers), str)) == [name]
            started += multiprocessing.active_children()
        process, same = started
        assert same is process
        process.kill()
        process.join()
        assert list(execute(workers, ["last"], submit(workers), str)) == ["last"]
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that kills")
def test_a_group_that_kills_every_process_is_named_after_four_and_the_others_are_kept(
    tmp_path: Path,
) -> None:
    workers = Processes(Marking(tmp_path), 2, ignore)
    found = []
    with workers, pytest.raises(StudyError, match="live through 'killed always', found that 4 ha"):
        found += execute(workers, ["first", "killed always"], submit(workers), repr)
    assert len((tmp_path / "killed always").read_text()) == 4
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_runs_whose_processes_are_killed_are_named_and_what_is_finished_is_kept(
    study: Study, tmp_path: Path
) -> None:
    def kill(_: int) -> None:
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    longer = study.model_copy(update={"iterations": 400})
    with pytest.raises(StudyError, match=r"the runs of '.*' at 0.25 from seed 3, at 0.5 from seed"):
        Sweep(longer, tmp_path, None, ignore).run(2, kill)
    assert not list(tmp_path.rglob("*.json"))
    assert multiprocessing.active_children() == []
