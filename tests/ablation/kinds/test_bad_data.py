"""Data that cannot be used, offered to the command: one sentence, nothing written or unpickled."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradagree_opt.ablation.runs.sweep import Part, Sweep
from gradagree_testing.command import contents, gradagree
from gradagree_testing.photographs import write_photographs
from gradagree_testing.pickles import Trap

from ..conftest import WriteStudy

OMNIGLOT = {"kind": "omniglot", "way": 2, "support_shots": 5}
PHOTOGRAPHS = {"kind": "mini-imagenet", "way": 2, "support_shots": 2}
OXBOYS = {"kind": "grouped", "dataset": "Oxboys", "support_shots": 5}
TEST = {"tasks": 4, "support_shots": 1, "query_shots": 2, "steps": [0, 1]}
SETTINGS = {"inner": {"lr": 0.1, "steps": 1}, "test": TEST}
SPLITS = np.arange(12) % 3


def refusal(study: Path, out: Path, *arguments: object) -> str:
    """The one sentence with which a study is refused; ``out`` is not made, nothing else changed."""
    before = contents(study.parent)
    result = gradagree("ablate", study, "--out", out, "--jobs", 1, *arguments)
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    assert message.startswith("gradagree: ") and "\n" not in message
    assert not out.exists()
    after = contents(study.parent)
    arrays = {name for name in after if "/cache/" in name}  # of splits decoded before the bad one
    assert {name: after[name] for name in after.keys() - arrays} == before
    return message


def images(characters: int = 12) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (characters, 20, 28, 28), dtype=np.uint8)


def write_drawings(path: Path, **members: Any) -> Path:
    np.savez(path, **{"images": images(), "vinyals_split": SPLITS} | members)
    return path


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"images": images().astype(np.int64)}, "expected images of dtype torch.uint8, found"),
        ({"images": images()[:, :, :9]}, "expected images of shape [characters, drawings, 28, 28]"),
        ({"images": images(9)}, "one split number for each of the 9 characters"),
        ({"vinyals_split": np.arange(12)}, "found 3"),
        (
            {"vinyals_split": np.arange(12) % 2 * 2},
            "no validation task of 2 classes with 1 support",
        ),
        ({"vinyals_split": np.array(["train"] * 12)}, "to hold integers, found <U5"),
    ],
)
def test_an_archive_of_another_form_is_refused(
    write_study: WriteStudy, tmp_path: Path, members: dict[str, Any], words: str
) -> None:
    data = write_drawings(tmp_path / "drawings.npz", **members)
    study = write_study(tasks=OMNIGLOT, **SETTINGS)
    assert words in refusal(study, tmp_path / "out", "--data", data)


@pytest.mark.parametrize(
    ("write", "tasks", "test", "words"),
    [
        (write_drawings, {"way": 5}, {}, "at most the 4 classes of split 'train', found 5"),
        (write_drawings, {"support_shots": 20}, {}, "20 drawings of a character, found 20 + 1"),
        (write_drawings, {}, {"support_shots": 19}, "20 drawings of a character, found 19 + 2"),
        (write_drawings, {"split": "background"}, {}, "found none named ['background']"),
        (write_photographs, {"way": 3}, {}, "at most the 2 classes of split 'train', found 3"),
        (write_photographs, {"support_shots": 4}, {}, "smallest class of split 'train', found 4"),
        (write_photographs, {}, {"support_shots": 3}, "smallest class of split 'train', found 3"),
    ],
)
def test_ways_and_shots_that_the_images_do_not_have_are_refused(
    write_study: WriteStudy,
    tmp_path: Path,
    write: Callable[[Path], Path],
    tasks: dict[str, Any],
    test: dict[str, Any],
    words: str,
) -> None:
    data = write(tmp_path / "data.npz")
    kind = OMNIGLOT if write is write_drawings else PHOTOGRAPHS
    study = write_study(tasks=kind | tasks, **SETTINGS | {"test": TEST | test})
    assert words in refusal(study, tmp_path / "out", "--data", data)


@pytest.mark.parametrize(
    ("tasks", "changes", "words"),
    [
        ({"support_shots": 9}, {}, "the 9 rows of the largest group of split 'train', found 9 + 1"),
        ({}, {"test": TEST | {"support_shots": 8}}, "split 'train', found 8 + 2"),
        (
            {"dataset": "Ovary", "support_shots": 12},
            {"corruption": {"kind": "foreign", "fraction": 0.5, "foreign": "Oxboys"}},
            "the tasks of Oxboys: expected support_shots + query_shots to be at most the 9 rows",
        ),
    ],
)
def test_shots_that_the_groups_do_not_have_are_refused(
    write_study: WriteStudy,
    tmp_path: Path,
    tasks: dict[str, Any],
    changes: dict[str, Any],
    words: str,
) -> None:
    study = write_study(tasks=OXBOYS | tasks, **SETTINGS | changes)
    assert words in refusal(study, tmp_path / "out")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: cut_off(root / "n3/2.jpg"), "a JPEG at {root}/n3/2.jpg, found a damaged"),
        (lambda root: (root / "n5/0.jpg").unlink(), "expected an image at {root}/n5/0.jpg"),
        (lambda root: (root / "n4").rename(root / "other"), "expected the images of class 'n4'"),
        (lambda root: (root / "val.csv").write_text("a;b\n1;2\n"), "filename and label in {root}"),
        (lambda root: (root / "val.csv").unlink(), "expected a split list at {root}/val.csv"),
        (
            lambda root: (root / "test.csv").write_bytes((root / "train.csv").read_bytes()),
            "expected no class in two split lists, found 'n",
        ),
    ],
)
def test_photographs_that_are_damaged_or_missing_are_named(
    write_study: WriteStudy, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    root = write_photographs(tmp_path / "photographs")
    spoil(root)
    study = write_study(tasks=PHOTOGRAPHS, **SETTINGS)
    message = refusal(study, tmp_path / "out", "--data", root)
    assert f"--data {root}: " in message and words.format(root=root) in message


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_data_that_are_gone_after_the_start_end_the_study_in_one_sentence(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    data = write_drawings(tmp_path / "drawings.npz")
    study = write_study(tasks=OMNIGLOT, **SETTINGS)
    run = Sweep.run

    def run_without_data(sweep: Sweep, *arguments: Any) -> Part:
        data.unlink()
        return run(sweep, *arguments)

    monkeypatch.setattr(Sweep, "run", run_without_data)
    result = gradagree("ablate", study, "--out", tmp_path / "out", "--data", data, "--jobs", jobs)
    assert result.exit_code == 1
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith(f"gradagree: --data {data}: found nothing there")
    assert sentence.endswith(f"; the finished runs are in {tmp_path / 'out'}")
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("without_figures")
def test_photographs_in_a_read_only_folder_are_decoded_into_the_users_cache(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_photographs(tmp_path / "photographs")
    (root / "cache").touch()  # in place of a folder: one without rights would not stop root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    study = write_study(tasks=PHOTOGRAPHS, **SETTINGS)
    before = contents(root)
    result = gradagree(
        "ablate", study, "--out", tmp_path / "out", "--data", root, "--jobs", 1, "--quick"
    )
    assert result.exit_code == 0, result.output
    assert contents(root) == before
    assert len(list((tmp_path / "caches/gradagree-opt").glob("mini-imagenet-*/*.npy"))) == 3


def test_a_damaged_drawing_of_torchvisions_folder_is_named(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    parts = ("images_background/Greek", "images_background/Hebrew", "images_evaluation/ULOG")
    for alphabet in parts:
        for character in range(3):
            folder = tmp_path / "data/omniglot-py" / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawing in range(8):
                Image.new("1", (105, 105), drawing % 2).save(folder / f"{drawing:02}.png")
    study = write_study(tasks=OMNIGLOT | {"way": 2}, **SETTINGS)
    damaged = folder / "03.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    message = refusal(study, tmp_path / "out", "--data", tmp_path / "data")
    assert f"expected a PNG at {damaged}, found a damaged one" in message


@pytest.mark.parametrize("place", ["archive", "member", "folder", "image", "array", "study"])
def test_a_pickle_is_refused_and_never_unpickled(
    write_study: WriteStudy, tmp_path: Path, place: str
) -> None:
    sprung, data = tmp_path / "sprung", tmp_path / "data.npz"
    trap = pickle.dumps(Trap(sprung))
    study = write_study(tasks=OMNIGLOT, **SETTINGS)
    data.write_bytes(trap)
    if place == "member":
        np.savez(data, images=np.array([Trap(sprung)], object), vinyals_split=SPLITS)
    elif place == "array":
        with data.open("wb") as file:
            np.save(file, np.array([Trap(sprung)], object))
    elif place == "folder":
        study = write_study(tasks=PHOTOGRAPHS, **SETTINGS)
    elif place == "image":
        study, data = write_study(tasks=PHOTOGRAPHS, **SETTINGS), tmp_path / "photographs"
        (write_photographs(data) / "n0/0.jpg").write_bytes(trap)
    elif place == "study":
        study.write_bytes(trap)
    refusal(study, tmp_path / "out", "--data", data)
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists(), "the trap works"


@pytest.mark.usefixtures("without_figures")
def test_a_pickle_among_the_records_is_a_damaged_record_and_never_unpickled(
    copied: Path, study_file: Path, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"
    expected = (copied / "table.md").read_bytes()
    records, arrays = (sorted(copied.glob(f"runs/*.{kind}")) for kind in ("json", "npz"))
    records[0].write_bytes(pickle.dumps(Trap(sprung)))
    for path in arrays[::2]:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    for path in arrays[1::2]:
        np.savez(path, weight=np.array([Trap(sprung)], object))
    result = gradagree("ablate", study_file, "--out", copied, "--jobs", 1)
    assert not sprung.exists()
    assert result.exit_code == 0, result.output
    assert result.stderr.count("redoing its run") == 1
    assert (copied / "table.md").read_bytes() == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_data_that_may_not_be_read_is_refused(write_study: WriteStudy, tmp_path: Path) -> None:
    data = write_drawings(tmp_path / "drawings.npz")
    data.chmod(0)
    study = write_study(tasks=OMNIGLOT, **SETTINGS)
    assert "Permission denied" in refusal(study, tmp_path / "out", "--data", data)
