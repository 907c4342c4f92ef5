"""Studies by leave-groups-out cross-validation: which seed sees which groups, and what it says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.training.problem import (
    TrainingTasks,
    build_problem,
    data_digest,
    evaluation_tasks,
)
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import train_runs
from gradagree_opt.cli import app
from gradagree_opt.tasks import grouped
from gradagree_opt.tasks.group_splits import fold_groups

WriteStudy = Callable[..., Path]
TREES = [f"tree {number}" for number in range(14)]
TASKS = {"kind": "grouped", "dataset": "Spruce", "folds": 4, "support_shots": 10}


@pytest.fixture
def frame(monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """In the place of the data: the days of the tree of number t are all t, up to a hundredth."""
    frame = pd.DataFrame(
        {
            "Tree": np.repeat(TREES, 20),
            "days": np.repeat(np.arange(14.0), 20) + np.tile(np.arange(20) / 2000, 14),
            "logSize": np.random.default_rng(0).normal(size=280),
        }
    )
    monkeypatch.setattr(grouped, "read_rdatasets", lambda *_: frame)
    return frame


def tree_names(distribution: Any, *batches: torch.Tensor) -> set[str]:
    """The trees that inputs are of, by their days."""
    mean, deviation = (float(value) for value in distribution.x_scale)
    days = torch.cat([x.flatten() for x in batches]).double() * deviation + mean
    return {f"tree {int(day)}" for day in (days + 1e-4).tolist()}


@pytest.mark.usefixtures("frame")
def test_seed_s_tests_on_fold_s_modulo_k_and_validates_on_the_next(write_study: WriteStudy) -> None:
    study = load(str(write_study(tasks=TASKS)))
    problem = build_problem(study, None)
    known = sorted(TREES)
    for seed in (0, 1, 2, 3, 4, 11):
        roles = dict(zip(known, fold_groups(known, folds=4, fold=seed % 4), strict=True))
        source = problem.training.distributions[seed % 4]
        training = TrainingTasks(study, problem, seed)
        drawn = {0: tree_names(source, *(training(step)["support"][0] for step in range(60)))}
        for number, split in ((1, "validation"), (2, "test")):
            tasks = evaluation_tasks(problem, 200, split, seed)
            drawn[number] = tree_names(source, *(x for x, _ in tasks.values()))
        for number, names in drawn.items():
            assert names == {name for name in known if roles[name] == number}, (seed, number)


def test_seeds_of_different_folds_trained_together_are_what_they_are_alone(
    write_study: WriteStudy,
) -> None:
    """The chicks of the folds differ in number, and the runs in the group in their fold."""
    tasks = TASKS | {"dataset": "ChickWeight", "support_shots": 5}
    test = {"tasks": 12, "support_shots": 5, "query_shots": 5, "steps": [0, 1]}
    study = load(str(write_study(tasks=tasks, test=test)))
    problem = build_problem(study, None)
    runs = [Run(method=study.methods[1], rate=0.5, seed=seed) for seed in (0, 1, 6)]
    together = train_runs(study, problem, runs, lambda _: None)
    for run, (record, params) in zip(runs, together, strict=True):
        [(alone, params_alone)] = train_runs(study, problem, [run], lambda _: None)
        assert record.validation == pytest.approx(alone.validation, rel=1e-5)
        assert record.test == pytest.approx(alone.test, rel=1e-5)
        for name, leaf in params.items():
            torch.testing.assert_close(leaf, params_alone[name])


def test_the_groups_that_a_seed_tests_on_do_not_touch_its_training(
    write_study: WriteStudy, frame: pd.DataFrame
) -> None:
    study = load(str(write_study(tasks=TASKS)))
    run = Run(method=study.methods[0], rate=0.5, seed=2)
    [(clean, params)] = train_runs(study, build_problem(study, None), [run], lambda _: None)
    known = sorted(TREES)
    roles = dict(zip(known, fold_groups(known, folds=4, fold=2), strict=True))
    frame.loc[frame["Tree"].map(roles) == 2, "logSize"] += 1e6
    [(marked, same)] = train_runs(study, build_problem(study, None), [run], lambda _: None)
    assert (marked.validation, marked.curve) == (clean.validation, clean.curve)
    assert all(torch.equal(params[name], same[name]) for name in params)
    assert marked.test[0] > 1e9 > clean.test[0]
    other = run.model_copy(update={"seed": 1})  # which validates on them
    [(spoilt, _)] = train_runs(study, build_problem(study, None), [other], lambda _: None)
    assert spoilt.validation > 1e9


def test_folds_are_in_the_keys_of_runs_where_they_are_given(write_study: WriteStudy) -> None:
    def key(**tasks: Any) -> str:
        study = load(str(write_study(tasks={k: v for k, v in (TASKS | tasks).items() if v})))
        return Run(method=study.methods[0], rate=0.5, seed=0).key(study, None)

    assert len({key(folds=None), key(folds=3), key(folds=4)}) == 3


def test_the_digest_is_of_the_data_of_every_fold(
    write_study: WriteStudy, frame: pd.DataFrame
) -> None:
    def digest(folds: int | None) -> str | None:
        tasks = TASKS | {"folds": folds}
        return data_digest(build_problem(load(str(write_study(tasks=tasks))), None))

    digests = [digest(folds) for folds in (None, 4, 5, 4)]
    assert digests[1] == digests[3] and len(set(digests)) == 3
    frame.loc[0, "logSize"] += 1
    assert digest(4) not in digests


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"folds": 2}, "greater than or equal to 3, found 2"),
        ({"folds": 80}, "expected folds to be 3 to 79, the number of groups, found 80"),
        (
            {"dataset": "Oxboys", "folds": 5},
            "the tasks of Oxboys, fold 0 of 5 for the test: expected support_shots +",
        ),
        (
            {"dataset": "Oxboys", "folds": 5},
            "at most the 9 rows of the largest group of split 'train', found 10 + 1",
        ),
    ],
)
def test_folds_that_the_data_do_not_have_are_refused(
    write_study: WriteStudy, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(StudyError) as caught:
        build_problem(load(str(write_study(tasks=TASKS | changes))), None)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("frame")
def test_corruption_spoils_the_training_of_every_fold(write_study: WriteStudy) -> None:
    corruption = {"kind": "label_noise", "fraction": 1.0, "scale": 2.0}
    clean, spoilt = (
        load(str(write_study(tasks=TASKS, **changes)))
        for changes in ({}, {"corruption": corruption})
    )
    problems = [build_problem(study, None) for study in (clean, spoilt)]
    for seed in range(4):
        (x, y), (same, noisy) = (TrainingTasks(clean, p, seed)(0)["support"] for p in problems)
        assert torch.equal(x, same) and not torch.isclose(y, noisy).all(1).any()
        tests = [evaluation_tasks(p, 5, "test", seed)["query"][1] for p in problems]
        assert torch.equal(*tests)


@pytest.mark.slow
@pytest.mark.usefixtures("frame", "without_figures")
def test_a_study_of_folds_runs_and_says_so(write_study: WriteStudy, tmp_path: Path) -> None:
    path, out = write_study(tasks=TASKS, seeds=[0, 1, 2, 3]), tmp_path / "out"
    result = CliRunner().invoke(app, ["ablate", str(path), "--out", str(out), "--jobs", "1"])
    assert result.exit_code == 0, result.output
    table, methods = ((out / name).read_text() for name in ("table.md", "methods.md"))
    assert "on 12 tasks drawn from unseen groups (one of 4 folds at each seed) after" in table
    assert "Folds: no group that a seed tests on is in its training" in table
    assert "leave-groups-out cross-validation in 4 folds: at seed s the fold of number s" in methods
    assert "those that validated at one seed tested at another" in methods
    assert "no test task took part in the choice" not in methods
    assert "12 tasks drawn from the groups of its fold" in methods
    runs = pd.read_csv(out / "results.csv")
    assert sorted(runs.loc[runs["chosen"], "seed"].unique()) == [0, 1, 2, 3]
