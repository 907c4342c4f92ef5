"""A study of a table of one's own, as the page of studies shows it."""

import os
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from gradagree_opt.ablation import ablate
from gradagree_opt.ablation.kinds import files
from gradagree_opt.ablation.kinds.own import OwnTasks
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.training.problem import build_problem, data_digest
from gradagree_testing.command import gradagree

from .conftest import WriteStudy

PAGE = Path(__file__).parents[2] / "docs" / "studies.md"


def shown(language: str, word: str) -> str:
    """The one block of the page that has the word in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    [block] = [block for block in blocks if word in block]
    return str(block)


def test_the_pages_function_makes_a_task_of_each_group_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fields.py").write_text(shown("python", "from_frame"))
    (tmp_path / "fields.yaml").write_text(shown("yaml", "fields:fields"))
    rows = [(f"field {row % 5}", row % 7, row % 11, 100 * (row % 5) + row) for row in range(60)]
    frame = pd.DataFrame(rows, columns=["field", "rain", "sun", "crop"])
    frame.to_csv("crops.csv", index=False)
    study = load("fields.yaml")
    assert isinstance(study.tasks, OwnTasks)
    training, test = study.tasks.build(study.test, Path("crops.csv"))
    fields = []
    for split in ("train", "validation", "test"):
        for distribution in (training, test):
            tasks = distribution.sample(50, split=split, generator=torch.Generator().manual_seed(0))
            x, y = tasks["support"]
            assert x.shape == (50, 5, study.tasks.input_size) and y.shape == (50, 5, 1)
        undone = y.double() * distribution.y_scale.deviation + distribution.y_scale.mean
        fields.append(set((undone.round().long() // 100).flatten().tolist()))
    assert sorted(field for each in fields for field in each) == [0, 1, 2, 3, 4]


def test_every_change_of_the_file_is_another_digest_though_few_groups_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fields.py").write_text(shown("python", "from_frame"))
    (tmp_path / "fields.yaml").write_text(shown("yaml", "fields:fields"))
    rows = [(f"field {row // 12}", row % 7, row % 11, float(row)) for row in range(600)]
    frame = pd.DataFrame(rows, columns=["field", "rain", "sun", "crop"])
    digests, study = set(), load("fields.yaml").model_copy(update={"compile": False})
    for changed in range(-1, 50):
        edited = frame.copy()
        if changed >= 0:
            edited.loc[12 * changed, "crop"] += 5
        edited.to_csv("crops.csv", index=False)
        digests.add(data_digest(build_problem(study, Path("crops.csv"))))
    assert len(digests) == 51


@pytest.mark.usefixtures("without_type_checks")
def test_a_frame_in_the_place_of_a_file_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected data to be a path, found DataFrame; write it to"):
        ablate("sine", out=tmp_path / "out", data=pd.DataFrame())  # type: ignore[arg-type] # refused
    assert not (tmp_path / "out").exists()


FOLDER = """
from pathlib import Path

from gradagree_opt.tasks import Sine


def tasks(support_shots, query_shots, root):
    assert sorted(Path(root).iterdir())
    return Sine(support_shots=support_shots, query_shots=query_shots)
"""


def test_every_change_of_a_file_in_a_folder_is_another_digest_and_hidden_files_are_none(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder_tasks.py").write_text(FOLDER)
    data = tmp_path / "data"
    (data / "deep/er").mkdir(parents=True)
    (data / "a.csv").write_text("1,2")
    (data / "deep/er/b.csv").write_text("3")
    (data / "circle").symlink_to(data)
    tasks = {"kind": "own", "make": "folder_tasks:tasks", "support_shots": 10}
    study = load(str(write_study(tasks=tasks)))

    def digest() -> str | None:
        return data_digest(build_problem(study, data))

    first = digest()
    (data / ".git").mkdir()
    (data / ".git/index").write_text("other")
    (data / "__pycache__").mkdir()
    (data / "__pycache__/x.pyc").write_text("other")
    os.utime(data / "a.csv", (1, 1))
    assert digest() == first
    digests = [first]
    (data / "a.csv").write_text("1,3")
    digests.append(digest())
    (data / "deep/er/b.csv").write_text("4")
    digests.append(digest())
    (data / "deep/er/b.csv").rename(data / "deep/er/c.csv")
    digests.append(digest())
    (data / "deep/er/c.csv").rename(data / "deep/c.csv")
    digests.append(digest())
    (data / "empty").touch()
    digests.append(digest())
    assert len(set(digests)) == len(digests)

    # of a large folder, sizes and times of change are looked at, and no bytes
    monkeypatch.setattr(files, "READ", 3)
    monkeypatch.setattr(files, "bytes_of", None)
    large = digest()
    os.utime(data / "a.csv", (5, 5))
    moved = digest()
    (data / "a.csv").write_text("1,33")
    os.utime(data / "a.csv", (5, 5))
    assert len({*digests, large, moved, digest()}) == len(digests) + 3


def test_an_output_folder_among_the_data_is_refused(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder_tasks.py").write_text(FOLDER)
    tasks = {"kind": "own", "make": "folder_tasks:tasks", "support_shots": 10}
    result = gradagree("ablate", write_study(tasks=tasks), "--data", ".", "--out", "runs/x")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "--data . holds the output folder runs/x" in result.stderr
    assert not Path("runs").exists()
