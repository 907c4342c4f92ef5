"""Studies on a device: which one, side by side, the same tasks and numbers; on a GPU by graphs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradagree_opt.ablation.report.citations import methods_text
from gradagree_opt.ablation.runs.job import Job, Task
from gradagree_opt.ablation.runs.store import read_config, read_results
from gradagree_opt.ablation.runs.sweep import Sweep, tuning_runs
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.sections import MAMLForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training import program as program_module
from gradagree_opt.ablation.training import scoring
from gradagree_opt.ablation.training.captured import NotCapturedError
from gradagree_opt.ablation.training.devices import Hardware, choose_device, describe
from gradagree_opt.ablation.training.networks import initial_params
from gradagree_opt.ablation.training.problem import (
    TrainingTasks,
    build_problem,
    evaluation_tasks,
    scores_after,
)
from gradagree_opt.ablation.training.run import Run, archive
from gradagree_opt.ablation.training.side_by_side import train_side_by_side
from gradagree_opt.ablation.training.training import Trained, train_runs
from gradagree_testing.command import gradagree
from gradagree_testing.devices import each_device, needs_gpu, train_group

from ..conftest import WriteStudy

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
EQUAL = Method(name="equal", aggregator="equal_agreement")
METHODS = {
    "mean": Method(name="mean", aggregator="mean"),
    "agreement with momentum": Method(name="ga", aggregator="gradient_agreement", outer="momentum"),
    "equal with Adam": EQUAL.model_copy(update={"outer": "adam"}),
    "random": Method(name="random", aggregator="random_weights"),
    "geometric median": Method(name="median", aggregator="geometric_median"),
    "length of equal": Method(
        name="length", aggregator="mean", options={"match_norm": {"aggregator": "equal_agreement"}}
    ),
}


def ignore(_: object) -> None:
    pass


def runs_of(method: Method, *labels: tuple[float, int]) -> list[Run]:
    return [Run(method=method, rate=rate, seed=seed) for rate, seed in labels]


def same_numbers(found: Trained, expected: Trained) -> bool:
    """Whether the records and the parameters are equal to the bit."""
    return all(
        record.model_dump(exclude={"seconds"}) == other.model_dump(exclude={"seconds"})
        and all(torch.equal(params[name], others[name]) for name in params)
        for (record, params), (other, others) in zip(found, expected, strict=True)
    )


@needs_no_gpu
def test_without_a_gpu_auto_is_the_cpu_and_a_gpu_is_refused_in_one_sentence() -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(StudyError, match=f"expected a GPU for the device '{name}', found none"):
            choose_device(name)


@needs_gpu
def test_with_a_gpu_auto_takes_it_and_one_too_many_is_refused() -> None:
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(StudyError, match="at most, found 'cuda:99'"):
        choose_device("cuda:99")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:one", ""])
def test_another_name_is_refused_in_a_file_and_in_the_command(
    write_study: WriteStudy, tmp_path: Path, name: str
) -> None:
    with pytest.raises(StudyError, match="in 'device': expected the device auto, cpu, cuda or"):
        load(str(write_study(device=name)))
    result = gradagree("ablate", write_study(), "--out", tmp_path / "out", "--device", name)
    assert result.exit_code == 2
    assert result.stderr.startswith("gradagree: --device: expected the device auto, cpu")
    assert not (tmp_path / "out").exists()


@needs_no_gpu
def test_a_study_for_a_gpu_is_refused_before_anything_is_written(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    result = gradagree("ablate", write_study(device="cuda"), "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.startswith("gradagree: expected a GPU")
    assert not (tmp_path / "out").exists()


def test_the_device_is_in_the_record_the_configuration_and_the_text_not_in_the_key(
    finished: Path, study: Study
) -> None:
    config = read_config(finished)
    here = describe(choose_device("auto"), tf32=False)
    assert config.hardware == here and here.name
    for part in read_results(finished, config):
        assert {record.hardware for record in part.records.values()} == {here}
    assert f"in float32 on a {here.device.upper().replace('CUDA', 'GPU')} ({here.name})." in (
        methods_text(config)
    )
    tf32 = Hardware(device="cuda", name="NVIDIA H100", arithmetic="TF32")
    text = methods_text(config.model_copy(update={"hardware": tf32}))
    assert "convolutions in TF32, on a GPU (NVIDIA H100)." in text
    older = methods_text(config.model_copy(update={"hardware": None}))
    assert here.name not in older and "float32" not in older
    run = tuning_runs(study)[0]
    for changes in ({"device": "cuda:1"}, {"tf32": True}):
        assert run.key(study.model_copy(update=changes), None) == run.key(study, None)


@pytest.mark.usefixtures("without_figures")
def test_records_of_another_device_are_kept_after_one_sentence(
    copied: Path, study_file: Path
) -> None:
    path = copied / "config.json"
    content = json.loads(path.read_text())
    content["hardware"] = {"device": "cuda", "name": "NVIDIA H100", "arithmetic": "float32"}
    path.write_text(json.dumps(content))
    result = gradagree("ablate", study_file, "--out", copied, "--jobs", 1, "--device", "cpu")
    assert result.exit_code == 0
    assert "those of NVIDIA H100 in float32 (now " in result.stderr


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


@needs_gpu
def test_a_seed_has_the_same_tasks_on_both_devices(study: Study) -> None:
    here, there = (build_problem(study, None, torch.device(d)) for d in ("cpu", "cuda"))
    sources = [TrainingTasks(study, problem, 3) for problem in (here, there, there)]
    for _ in range(4):
        for leaves in zip(*(source.draw()["support"] for source in sources), strict=True):
            assert torch.equal(leaves[0], leaves[1]) and torch.equal(leaves[0], leaves[2])
    for split in ("validation", "test"):
        ours, theirs = (evaluation_tasks(problem, 5, split, 3) for problem in (here, there))
        for part in ours:
            for leaf, other in zip(ours[part], theirs[part], strict=True):
                assert other.is_cuda and torch.equal(leaf, other.cpu())


@needs_gpu
@pytest.mark.parametrize("form", ["reptile", "maml", "multi-task"])
@pytest.mark.parametrize("name", METHODS)
def test_both_devices_agree_within_rounding_after_a_few_steps(
    study: Study, write_digits: WriteStudy, name: str, form: str
) -> None:
    if form == "multi-task":
        study = load(str(write_digits()))
    if form == "maml":
        study = study.model_copy(update={"form": MAMLForm(kind="maml")})
    runs = runs_of(METHODS[name], (0.01, 3), (0.02, 5))
    found, expected = (
        train_group(study, build_problem(study, None, torch.device(device)), runs)
        for device in ("cuda", "cpu")
    )
    for (record, params), (other, others) in zip(found, expected, strict=True):
        torch.testing.assert_close(params, others, rtol=1e-3, atol=1e-5)
        assert record.validation == pytest.approx(other.validation, rel=1e-3)
        assert record.test == pytest.approx(other.test, rel=1e-3, abs=1e-3)
        for point, theirs in zip(record.curve, other.curve, strict=True):
            assert point.iteration == theirs.iteration
            assert point.diagnostics.keys() == theirs.diagnostics.keys()
            assert point.diagnostics == pytest.approx(theirs.diagnostics, rel=1e-2, abs=1e-3)
        assert record.hardware is not None and record.hardware.device == "cuda"


@needs_gpu
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", ["reptile", "maml"])
@pytest.mark.parametrize("name", METHODS)
def test_a_captured_step_does_what_its_operations_do_one_by_one(
    study: Study, monkeypatch: pytest.MonkeyPatch, name: str, form: str, count: int
) -> None:
    study = study.model_copy(update={"iterations": 130})
    if form == "maml":
        study = study.model_copy(update={"form": MAMLForm(kind="maml")})
    problem = build_problem(study, None, torch.device("cuda"))
    runs = runs_of(METHODS[name], (0.01, 3), (0.02, 5), (0.04, 3))[:count]
    found = train_group(study, problem, runs)
    asked: list[object] = []

    def one_by_one(function: Callable[[], None], _: object) -> Callable[[], None]:
        asked.append(function)
        return function

    monkeypatch.setattr(program_module, "captured", one_by_one)
    expected = train_group(study, problem, runs)
    assert len(asked) == 2
    for (record, params), (other, others) in zip(found, expected, strict=True):
        torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-6)
        assert record.validation == pytest.approx(other.validation, rel=1e-4)


@needs_gpu
def test_a_step_that_waits_for_the_device_is_done_one_by_one_after_one_sentence(
    study: Study,
) -> None:
    method = Method(name="power", aggregator="gramian_power", options={"power": 0.5})
    runs = runs_of(method, (0.1, 3), (0.2, 5))
    told: list[str] = []
    problem = build_problem(study, None, torch.device("cuda"))
    found = train_group(study, problem, runs, tell=told.append)
    [sentence] = told
    assert sentence.startswith("the outer steps of 'power' cannot be one CUDA graph")
    expected = train_group(study, build_problem(study, None), runs)
    for (_, params), (_, others) in zip(found, expected, strict=True):
        torch.testing.assert_close(params, others, rtol=1e-3, atol=1e-5)


def test_the_sentence_of_a_step_that_cannot_be_captured_names_the_method_and_the_reason(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Callable[[], None]:
        raise NotCapturedError("it waits")

    monkeypatch.setattr(program_module, "captured", refuse)
    told: list[str] = []
    problem, runs = build_problem(study, None), runs_of(EQUAL, (0.5, 3))
    program = program_module.Program(study, problem, runs, [initial_params(study, 3)], told.append)
    program.load()
    program.device = torch.device("cuda")  # for the choice alone: its tensors are on the CPU
    program.make_steps()
    [sentence] = told
    assert "'equal'" in sentence and sentence.endswith("it waits") and "\n" not in sentence


@needs_gpu
def test_a_whole_study_on_a_gpu_lies_by_that_on_a_cpu(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    study = write_study(iterations=120, methods=[{"name": n, "aggregator": a} for n, a in (
        ("mean", "mean"), ("equal", "equal_agreement"), ("random", "random_weights"))])  # fmt: skip
    results = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        result = gradagree("ablate", study, "--out", out, "--jobs", 2, "--device", device)
        assert result.exit_code == 0, result.output
        [results[device]] = read_results(out, read_config(out))
    assert results["cpu"].records.keys() == results["cuda"].records.keys()
    for label, record in results["cuda"].records.items():
        assert record.hardware is not None and record.hardware.device == "cuda"
        other = results["cpu"].records[label]
        assert record.validation == pytest.approx(other.validation, rel=0.02)
    assert results["cpu"].rates == results["cuda"].rates


@each_device
def test_diverged_runs_end_alone_on_each_device(study: Study, device: str) -> None:
    study = study.model_copy(update={"iterations": 60})
    problem = build_problem(study, None, torch.device(device))
    runs = runs_of(METHODS["mean"], (1e30, 3), (0.25, 3))
    (lost, _), (kept, _) = train_group(study, problem, runs)
    assert lost.validation == float("inf") and lost.curve[-1].iteration < 60
    assert set(lost.test.values()) == {float("inf")} and lost.agreement is None
    assert kept.validation < float("inf") and kept.curve[-1].iteration == 60
