"""Groups of runs side by side, in one process: each finds what it finds alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradagree_opt.ablation.runs.job import Job, Task
from gradagree_opt.ablation.runs.sweep import Sweep, tuning_runs
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.sections import MAMLForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training import scoring
from gradagree_opt.ablation.training.networks import initial_params
from gradagree_opt.ablation.training.problem import (
    TrainingTasks,
    build_problem,
    evaluation_tasks,
    scores_after,
)
from gradagree_opt.ablation.training.run import archive
from gradagree_opt.ablation.training.side_by_side import train_side_by_side
from gradagree_opt.ablation.training.training import Trained, train_runs
from gradagree_testing.devices import each_device, train_group

from ..conftest import WriteStudy
from .conftest import METHODS, runs_of


def ignore(_: object) -> None:
    pass


def same_numbers(found: Trained, expected: Trained) -> bool:
    """Whether the records and the parameters are equal to the bit."""
    return all(
        record.model_dump(exclude={"seconds"}) == other.model_dump(exclude={"seconds"})
        and all(torch.equal(params[name], others[name]) for name in params)
        for (record, params), (other, others) in zip(found, expected, strict=True)
    )


@pytest.mark.slow
def test_groups_side_by_side_find_what_they_find_alone(study: Study) -> None:
    problem = build_problem(study, None)
    labels = ((0.5, 3), (0.25, 5))
    groups = [runs_of(method, *labels) for method in METHODS.values()]
    alone = [train_runs(study, problem, group, ignore) for group in groups]
    for at_once in (None, 1, 3):
        steps: list[int] = []
        found = train_side_by_side(study, problem, groups, at_once, steps.append, pytest.fail)
        by_method = {trained[0][0].run.method.name: trained for trained in found}
        assert sum(steps) == study.iterations * 2 * len(groups)
        assert len(by_method) == len(groups)
        for group, expected in zip(groups, alone, strict=True):
            trained = by_method[group[0].method.name]
            assert same_numbers(trained, expected), f"{at_once} at once"
            assert all(record.seconds > 0 for record, _ in trained)


def test_a_job_does_all_runs_in_one_process(study: Study, tmp_path: Path) -> None:
    job = Job(study, None, None, compiled=False)
    runs = tuning_runs(study)
    found = list(job.perform_all([], runs, ignore))
    groups = [[record for record, _ in group] for group in found]
    assert sorted(r.run.label for group in groups for r in group) == sorted(r.label for r in runs)
    assert all(len({record.run.method.name for record in group}) == 1 for group in groups)
    expected = Sweep(study, tmp_path / "processes", None, pytest.fail)
    expected.complete(runs, 1, ignore)
    for group in groups:
        for record in group:
            other = expected.records[record.run.label]
            assert record.validation == pytest.approx(other.validation, rel=1e-4)


@each_device
def test_a_worker_finds_what_its_group_finds_elsewhere(study: Study, device: str) -> None:
    job = Job(study, None, None, compiled=False, device=torch.device(device))
    runs = runs_of(METHODS["random"], (0.5, 3), (0.25, 5))
    told: list[object] = []
    found = job.perform(job.prepare(), Task(runs), told.append)
    expected = train_group(study, job.prepare(), runs)
    for (record, params), (other, others) in zip(found, expected, strict=True):
        assert record.model_dump(exclude={"seconds"}) == other.model_dump(exclude={"seconds"})
        assert params == archive(others)
    assert sum(map(int, told)) == study.iterations * len(runs)


@pytest.mark.parametrize("numbers", [1, 10**9])
@pytest.mark.parametrize("kind", ["sine", "apart", "maml", "digits"])
def test_runs_are_scored_together_as_they_are_one_by_one(
    write_study: WriteStudy,
    write_digits: WriteStudy,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    numbers: int,
) -> None:
    path = write_digits() if kind == "digits" else write_study()
    study = load(str(path))
    if kind == "maml":
        study = study.model_copy(update={"form": MAMLForm(kind="maml")})
    problem = replace(build_problem(study, None), transductive=kind != "apart")
    seeds = [3, 5, 3]
    params = scoring.stack([initial_params(study, seed) for seed in (1, 2, 3)])
    tests = [evaluation_tasks(problem, study.test.tasks, "test", seed) for seed in seeds]
    batches = [TrainingTasks(study, problem, seed)(0) for seed in seeds]
    steps = study.test.steps

    def found() -> list[torch.Tensor]:
        scores = scoring.scores_of_runs(problem, problem.score, params, tests, steps)
        return [*scores.values(), scoring.matrices_of_runs(problem, params, batches)]

    expected = found()
    one = scores_after(problem, problem.score, scoring.select(params, 1), tests[1], steps)
    assert expected[-2][1] == one[steps[-1]].mean()
    monkeypatch.setattr(scoring, "NUMBERS_AT_ONCE", numbers)
    monkeypatch.setattr(
        scoring, "each_run", lambda _, function, *rest: scoring.together(function, *rest)
    )
    for together, alone in zip(found(), expected, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_block_that_another_group_has_drawn_is_taken_over_with_its_place_in_the_stream(
    study: Study,
) -> None:
    problem = build_problem(study, None)
    first, second, third = (TrainingTasks(study, problem, 3) for _ in range(3))
    drawn = [first.draw()]
    states = first.generator.get_state(), first.flips.get_state()
    problem.drawn[3, 0] = drawn[0], states
    drawn.append(first.draw())
    assert second.draw() is drawn[0]
    del problem.drawn[3, 0]
    for source in (second, third):
        source.number = 0 if source is third else 1
        while source.number < 2:
            block = source.draw()
        assert torch.equal(block["support"][0], drawn[1]["support"][0])
