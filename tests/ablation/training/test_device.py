"""Studies on a device: which one, and the same tasks and numbers on each."""

import json
from pathlib import Path

import pytest
import torch

from gradagree_opt.ablation.report.citations import methods_text
from gradagree_opt.ablation.runs.store import read_config, read_results
from gradagree_opt.ablation.runs.sweep import tuning_runs
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.sections import MAMLForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.devices import Hardware, choose_device, describe
from gradagree_opt.ablation.training.problem import TrainingTasks, build_problem, evaluation_tasks
from gradagree_testing.command import gradagree
from gradagree_testing.devices import each_device, needs_gpu, train_group

from ..conftest import WriteStudy
from .conftest import METHODS, runs_of

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")


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
