"""A study of learn2learn's tasksets, made by a function that the study file names."""

from pathlib import Path

import pytest
import torch

from gradagree_opt.ablation.kinds.learn2learn import Learn2LearnTasks
from gradagree_opt.ablation.runs.sweep import Sweep
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.training.problem import build_problem, data_digest
from gradagree_testing.command import gradagree

from ..conftest import WriteStudy
from ..spied import drawn, highest, trained_alike

pytest.importorskip("learn2learn", reason="learn2learn is not installed")

MODULE = '''
import functools
import random

import learn2learn as l2l
import numpy as np
import torch
from learn2learn.data.transforms import FusedNWaysKShots, LoadData, RemapLabels

def make(
    train_ways, train_samples, test_ways, test_samples,
    shift=0.0, marker=0.0, root=None, ways=None, samples=None, remap=True, side=None,
):
    """Points around a place of each class; the classes of the parts are far from one another."""
    only_ways, only_samples = ways, samples
    def taskset(first, ways, samples, marker=0.0):
        ways, samples = only_ways or ways, only_samples or samples
        labels = (first + torch.arange(6)).repeat_interleave(9)
        places = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(54, 2, generator=torch.Generator().manual_seed(first))
        x = 100 * first + shift + marker + places[labels] + 0.01 * noise
        if side:
            x = x[:, :1, None].expand(-1, side, side)
        data = l2l.data.MetaDataset(torch.utils.data.TensorDataset(x, labels))
        transforms = [
            FusedNWaysKShots(data, n=ways, k=samples),
            LoadData(data),
            *([RemapLabels(data, shuffle=False)] if remap else []),
        ]
        return l2l.data.Taskset(data, transforms)
    return (
        taskset(0, train_ways, train_samples),
        taskset(10, test_ways, test_samples),
        taskset(20, test_ways, test_samples, marker),
    )

def shuffled(shuffle, train_ways, train_samples, test_ways, test_samples, apart=True):
    """Thirty classes, one a number, dealt to the parts anew in every call."""
    labels = torch.arange(30).repeat_interleave(9)
    x = labels.unsqueeze(1).expand(-1, 2).float()
    data = l2l.data.MetaDataset(torch.utils.data.TensorDataset(x, labels))
    classes = list(range(30))
    shuffle(classes)
    parts = []
    for first, ways, samples in (
        (0, train_ways, train_samples), (10, test_ways, test_samples), (20, test_ways, test_samples)
    ):
        part = l2l.data.FilteredMetaDataset(data, classes[first : first + 10])
        drawn_from = part if apart else data
        transforms = [lambda task: task, FusedNWaysKShots(drawn_from, n=ways, k=samples)]
        parts.append(l2l.data.Taskset(part, [*transforms, LoadData(part), RemapLabels(part)]))
    return parts

calls = []

def never_the_same(**ways_and_samples):
    calls.append(None)
    return make(**ways_and_samples, shift=float(len(calls)))

by_python = functools.partial(shuffled, random.shuffle)
by_numpy = functools.partial(shuffled, np.random.shuffle)

def by_torch(**ways_and_samples):
    def shuffle(classes):
        classes[:] = torch.randperm(len(classes)).tolist()
    return shuffled(shuffle, **ways_and_samples)

def refusing(**_):
    raise RuntimeError("Dataset not found.\\nUse download=True")

nothing = None
'''
TASKS = {
    "kind": "learn2learn",
    "tasksets": "points:make",
    "inputs": 2,
    "way": 3,
    "support_shots": 2,
    "query_shots": 3,
}
CHANGES = {
    "name": "points",
    "inner": {"lr": 0.02, "steps": 2},
    "test": {"tasks": 12, "support_shots": 5, "query_shots": 4, "steps": [0, 1, 2]},
}


def ignore(_: object) -> None:
    pass


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "points.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_training_and_test_have_their_own_shots_and_splits(write_study: WriteStudy) -> None:
    problem = build_problem(load(str(write_study(tasks=TASKS, **CHANGES))), None)
    for distribution, split, place, support, query in (
        (problem.training, "train", 0, 6, 9),
        (problem.evaluation, "validation", 1000, 15, 12),
        (problem.evaluation, "test", 2000, 15, 12),
    ):
        tasks = distribution.sample(4, split=split, generator=torch.Generator().manual_seed(1))
        assert tasks["support"][0].shape == (4, support, 2)
        assert tasks["query"][0].shape == (4, query, 2)
        assert all((x - place).abs().max() < 10 for x, _ in tasks.values())
        assert sorted(tasks["query"][1][0].tolist()) == sorted([0, 1, 2] * (query // 3))


def test_options_reach_the_function_and_other_data_has_another_digest(
    write_study: WriteStudy,
) -> None:
    digests = [
        data_digest(build_problem(load(str(write_study(tasks=tasks, **CHANGES))), None))
        for tasks in (TASKS, TASKS, TASKS | {"options": {"shift": 1.0}})
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_marker_in_test_tasks_is_seen_by_the_test_alone(write_study: WriteStudy) -> None:
    study = load(str(write_study(tasks=TASKS, **CHANGES)))
    tasks = study.tasks.model_copy(update={"options": {"marker": 1e6}})
    marked = build_problem(study.model_copy(update={"tasks": tasks}), None)
    trained_alike(study, build_problem(study, None), marked)
    seen = drawn(study, marked)
    assert {split for split in seen if highest(seen[split]) > 1e5} == {"test"}


@pytest.mark.parametrize("function", ["by_python", "by_numpy", "by_torch"])
def test_classes_that_are_shuffled_are_the_same_in_every_process_and_apart(
    write_study: WriteStudy, function: str
) -> None:
    study = load(str(write_study(tasks=TASKS | {"tasksets": f"points:{function}"}, **CHANGES)))
    problems = [build_problem(study, None) for _ in range(2)]
    assert data_digest(problems[0]) == data_digest(problems[1])
    classes = {
        split: set(
            distribution.sample(40, split=split, generator=torch.Generator().manual_seed(0))[
                "query"
            ][0]
            .flatten()
            .tolist()
        )
        for split, distribution in (
            ("train", problems[0].training),
            ("validation", problems[1].evaluation),
            ("test", problems[1].evaluation),
        )
    }
    assert [len(found) for found in classes.values()] == [10, 10, 10]
    assert len(set.union(*classes.values())) == 30


def test_parts_that_draw_from_all_classes_as_learn2learns_omniglot_does_are_refused(
    write_study: WriteStudy,
) -> None:
    tasks = TASKS | {"tasksets": "points:by_python", "options": {"apart": False}}
    with pytest.raises(StudyError, match="by_python: expected train and validation tasks of d"):
        build_problem(load(str(write_study(tasks=tasks, **CHANGES))), None)


def test_processes_that_would_have_other_tasks_train_none(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    tasks = TASKS | {"tasksets": "points:never_the_same"}
    sweep = Sweep(load(str(write_study(tasks=tasks, **CHANGES))), tmp_path / "out", None, ignore)
    with pytest.raises(StudyError, match="expected the data that the study began with"):
        sweep.run(1, ignore)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"ways": 2}}, r"support .* a train task: .* 0 to 2, found \[0, 1\]"),
        ({"options": {"remap": False}}, r"a train task: expected classes 0 to 2, found \["),
        (
            {"options": {"samples": 9}},
            r"the query examples of a train task: expected 3 of each class, found \[7, 7, 7\]",
        ),
        ({"options": {"side": 3}}, "train task: expected 2 numbers in each, found 9"),
        ({"options": {"side": 28}, "inputs": 784}, r"\[1, 28, 28\] for conv4, found \[28, 28\]"),
    ],
)
def test_tasks_that_are_not_those_of_the_study_are_refused(
    write_study: WriteStudy, changes: dict[str, object], message: str
) -> None:
    model = {"kind": "conv4"} if "inputs" in changes else {"kind": "mlp", "hidden": [4]}
    study = load(str(write_study(tasks=TASKS | changes, model=model, **CHANGES)))
    with pytest.raises(StudyError, match=message) as caught:
        build_problem(study, None)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.slow
def test_a_study_runs_from_the_command(write_study: WriteStudy, tmp_path: Path) -> None:
    path = write_study(tasks=TASKS, **CHANGES)
    out = tmp_path / "out"
    result = gradagree("ablate", path, "--out", out, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert "accuracy in %" in (out / "table.md").read_text()
    assert "learn2learn" in (out / "methods.md").read_text()
    assert "arnold2020learn2learn" in (out / "references.bib").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasksets": "absent:make"}, "No module named 'absent'"),
        ({"tasksets": "points:absent"}, "has no attribute 'absent'"),
        ({"tasksets": "points:nothing"}, "not callable"),
        ({"options": {"colour": 1}}, "unexpected keyword argument 'colour'"),
        ({"tasksets": "points:refusing"}, "RuntimeError: Dataset not found.$"),
        (
            {
                "tasksets": "learn2learn.vision.benchmarks:get_tasksets",
                "options": {"name": "omniglott"},
            },
            "KeyError: 'omniglott'",
        ),
    ],
)
def test_what_is_wrong_with_the_function_is_told_in_one_sentence(
    write_study: WriteStudy, changes: dict[str, object], message: str
) -> None:
    study = load(str(write_study(tasks=TASKS | changes, **CHANGES)))
    assert isinstance(study.tasks, Learn2LearnTasks)
    with pytest.raises(StudyError, match=message) as caught:
        build_problem(study, None)
    start = f"the tasksets of {study.tasks.tasksets}: "
    assert str(caught.value).startswith(start) and str(caught.value).count(start) == 1
    assert "\n" not in str(caught.value)


def test_a_convolutional_network_needs_drawings(write_study: WriteStudy) -> None:
    with pytest.raises(StudyError, match="a conv4 model needs drawings of 784 numbers"):
        load(str(write_study(tasks=TASKS, model={"kind": "conv4"}, **CHANGES)))
