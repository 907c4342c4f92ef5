"""TensorBoard's event files, read back by its own reader and compared with the records."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gradagree_opt.ablation.runs.store import read_config, read_results
from gradagree_testing.command import gradagree

pytest.importorskip("tensorboard")

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def events(folder: Path) -> "EventAccumulator":
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list(folder.iterdir())) == 1
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return found


def single(value: float) -> object:
    """As it is in an event file, in single precision."""
    return pytest.approx(value, rel=1e-6, nan_ok=True)


def check(folder: Path, out: Path) -> None:
    """One file for each run of the study, with all that its record holds."""
    [results] = read_results(out, read_config(out))
    assert len(list(folder.rglob("events.*"))) == len(results.records) == 9
    for (name, rate, seed), record in results.records.items():
        found = events(folder / name / f"rate-{rate:g}" / f"seed-{seed}")
        curve = found.Scalars("validation loss")
        assert [point.step for point in curve] == [point.iteration for point in record.curve]
        for shown, point in zip(curve, record.curve, strict=True):
            assert shown.value == single(point.loss)
        for entry in record.curve[-1].diagnostics:
            shown = found.Scalars(f"diagnostics/{entry}")
            expected = [(p.iteration, p.diagnostics[entry]) for p in record.curve[1:]]
            assert [point.step for point in shown] == [step for step, _ in expected]
            assert [point.value for point in shown] == [single(value) for _, value in expected]
        tests = {tag for tag in found.Tags()["scalars"] if tag.startswith("test/")}
        assert tests == {
            "test/mse after 0 steps",
            "test/mse after 1 step",
            "test/mse after 2 steps",
        }
        [score] = found.Scalars("test/mse after 1 step")
        assert (score.step, score.value) == (5, single(record.test[1]))
        assert settings(found) == {"method": name, "rate": rate, "seed": seed}


def settings(found: "EventAccumulator") -> dict[str, object]:
    """The hyperparameters as TensorBoard's own plugin reads them."""
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    return {
        name: value.string_value if value.HasField("string_value") else value.number_value
        for name, value in hparams.items()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_new_study_a_resumed_one_and_a_finished_one_have_the_files_of_all_runs(
    study_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("ablate", study_file, "--out", out, "--jobs", 1, "--tensorboard")
    assert gradagree(*command).exit_code == 0
    check(out / "tensorboard", out)

    for damaged in (*list(out.glob("runs/*.json"))[:2], *out.glob("tensorboard/mean/*/seed-3/*")):
        damaged.unlink()
    assert gradagree(*command).exit_code == 0
    check(out / "tensorboard", out)

    shutil.rmtree(out / "tensorboard")
    assert gradagree(*command[:-1]).exit_code == 0
    assert not (out / "tensorboard").exists()
    assert gradagree(*command).exit_code == 0
    check(out / "tensorboard", out)


@pytest.mark.usefixtures("without_figures")
def test_every_fraction_has_a_folder(swept: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(swept, tmp_path / "out"))
    assert gradagree("ablate", out / "config.json", "--out", out, "--tensorboard").exit_code == 0
    for part in read_results(out, read_config(out)):
        folder = out / "tensorboard" / f"corrupted-{part.study.fraction:g}"
        assert len(list(folder.rglob("events.*"))) == len(part.records)
        record = part.final("agreement")[2]
        found = events(folder / "agreement" / f"rate-{record.run.rate:g}" / "seed-6")
        assert found.Scalars("validation loss")[-1].value == single(record.validation)


@pytest.mark.parametrize(
    ("one", "other"), [("a/b", "a%2Fb"), ("..", "."), ("a:b", "a b"), ("../../x", "x")]
)
def test_every_name_of_a_method_is_a_folder_of_its_own_below(one: str, other: str) -> None:
    from gradagree_opt.ablation.report.event_files import file_name

    names = {file_name(one), file_name(other)}
    assert len(names) == 2
    assert all(Path(name).name == name and not name.startswith(".") for name in names)


def test_without_tensorboard_one_sentence_has_the_command_and_nothing_is_done(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "gradagree_opt.ablation.report.event_files", raising=False)
    result = gradagree("ablate", study_file, "--out", tmp_path / "out", "--tensorboard")
    message = result.stderr.strip()
    assert result.exit_code == 2 and "\n" not in message
    assert message.startswith("gradagree: --tensorboard: expected tensorboard>=")
    assert 'pip install "tensorboard>=' in message
    assert not (tmp_path / "out").exists()
