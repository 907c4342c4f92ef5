"""`gradagree report A B`: methods of two folders on the same tasks and seeds, or one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from gradagree_opt.ablation import ablate
from gradagree_opt.ablation.report.beside import compare_folders, varied
from gradagree_opt.ablation.report.significance import p_value
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_testing.command import contents, gradagree, leave_pictures_empty

from ..conftest import TINY, WriteStudy


@pytest.fixture(scope="module")
def other(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of the same tasks with another method, one more seed, and fewer iterations."""
    changes = {
        "name": "other",
        "seeds": [7, 5, 3],
        "iterations": 3,
        "tuning": {"seeds": [9], "tasks": 10, "steps": 1},
        "methods": [{"name": "mean", "aggregator": "mean"}, {"name": "x", "aggregator": "sum"}],
    }
    folder = tmp_path_factory.mktemp("beside") / "other"
    with pytest.MonkeyPatch.context() as patch:
        leave_pictures_empty(patch)
        ablate(yaml.safe_load(TINY) | changes, out=folder, jobs=1)
    return folder


def scores(folder: Path, method: str) -> dict[int, float]:
    """After one step, at the chosen rate, by seed; read from the file of all runs."""
    runs = pd.read_csv(folder / "results.csv")
    runs = runs[(runs["method"] == method) & runs["chosen"] & (runs["steps"] == 1)]
    return dict(zip(runs["seed"], runs["mse"], strict=True))


def test_differences_are_paired_by_the_seeds_that_both_have(finished: Path, other: Path) -> None:
    report = compare_folders([finished, other])
    table = report.numbers.set_index("method")
    assert set(table.index) == {
        "out: mean",
        "out: agreement",
        "out: random_weights & co",
        "other: mean",
        "other: x",
    }
    baseline = scores(finished, "mean")
    for name in ("mean", "x"):
        theirs = scores(other, name)
        expected = [theirs[seed] - baseline[seed] for seed in (3, 5)]
        row = table.loc[f"other: {name}"]
        assert row["difference"] == pytest.approx(sum(expected) / 2)
        assert row["p"] == pytest.approx(p_value(expected))
        assert row["mean_1_steps"] == pytest.approx((theirs[3] + theirs[5]) / 2)
    assert any("iterations 5 in out, 3 in other" in note for note in report.notes)
    assert any("over 2 seeds" in note for note in report.notes)


@pytest.mark.usefixtures("without_figures")
def test_the_same_runs_are_there_once(
    finished: Path, tmp_path: Path, write_study: WriteStudy
) -> None:
    methods = [{"name": "average", "aggregator": "mean"}, {"name": "sum", "aggregator": "sum"}]
    ablate(write_study(methods=methods, baseline="sum"), out=tmp_path / "again", jobs=1)
    report = compare_folders([finished, tmp_path / "again"])
    assert [name for name in report.numbers["method"] if "again" in name] == ["again: sum"]
    assert '"again: average" has the same runs as "out: mean".' in report.notes
    assert not any("differ in more" in note for note in report.notes)


def test_options_that_only_one_study_has_are_told_one_by_one(write_study: WriteStudy) -> None:
    plain = {"kind": "own", "make": "my_file:network"}
    studies = [
        load(str(write_study(model=model))) for model in (plain, plain | {"options": {"width": 9}})
    ]
    assert varied(studies, "model") == {"model.options.width": [None, 9]}


def test_fractions_stand_beside_each_other(swept: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(swept, tmp_path / "copy")
    report = compare_folders([swept, copy])
    assert report.numbers["fraction"].unique().tolist() == [0.0, 0.2, 0.5]
    assert len(report.numbers) == 9  # the copy's runs are the same


def test_the_command_prints_the_table_and_changes_no_folder(
    finished: Path, other: Path, tmp_path: Path
) -> None:
    before = contents(finished) | contents(other)
    result = gradagree("report", finished, other, "--out", tmp_path / "both.md")
    assert result.exit_code == 0, result.output
    assert "other: x" in result.stdout
    assert "| other: x |" in (tmp_path / "both.md").read_text()
    assert contents(finished) | contents(other) == before


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda study: study["tasks"].update(ranges="finn"), 'tasks.ranges "paper" in out and'),
        (lambda study: study["tasks"].update(support_shots=20), "tasks.support_shots 10 in out"),
        (lambda study: study["test"].update(tasks=13), "test.tasks 12 in out and 13 in copied"),
        (lambda study: study["tuning"].update(steps=2), "tuning.steps 1 in out and 2 in copied"),
        (
            lambda study: study.update(corruption={"kind": "shuffled_labels", "fraction": 0.5}),
            'corruption.kind null in out and "shuffled_labels" in copied',
        ),
        (
            lambda study: study.update(seeds=[0, 1]),
            "expected seeds in common, found [3, 5] in out and [0, 1] in copied",
        ),
    ],
)
def test_folders_that_cannot_be_compared_are_refused_in_one_sentence(
    finished: Path, copied: Path, change: Change, words: str
) -> None:
    config = json.loads((copied / "config.json").read_text())
    change(config["study"])
    (copied / "config.json").write_text(json.dumps(config))
    result = gradagree("report", finished, copied)
    assert result.exit_code == 2 and result.stdout == ""
    message = result.stderr.strip()
    assert words in message and "\n" not in message


def test_other_data_are_other_tasks(finished: Path, copied: Path, tmp_path: Path) -> None:
    folders = [copied, Path(shutil.copytree(copied, tmp_path / "data"))]
    for folder, digest in zip(folders, "ab", strict=True):
        config = json.loads((folder / "config.json").read_text()) | {"data_sha256": digest}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StudyError, match='found data_sha256 "a" in copied and "b" in data'):
        compare_folders(folders)


def test_one_folder_twice_and_an_unfinished_one_are_refused(finished: Path, copied: Path) -> None:
    with pytest.raises(StudyError, match="expected different folders"):
        compare_folders([finished, finished / ".." / finished.name])
    next(copied.glob("runs/*.json")).unlink()
    with pytest.raises(StudyError, match="are missing"):
        compare_folders([finished, copied])
    result = gradagree("report", finished, "--out", "table.md")
    assert result.exit_code == 2 and "--out is for several folders" in result.stderr
