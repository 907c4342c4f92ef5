"""The corruption of a study: what it does to training tasks, and what it leaves alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.sections import CorruptionSection
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.problem import (
    Tasks,
    TrainingTasks,
    build_problem,
    data_digest,
    evaluation_tasks,
)

WriteStudy = Callable[..., Path]


def tensors(tasks: Tasks) -> list[torch.Tensor]:
    return [tensor for part in ("support", "query") for tensor in tasks[part]]


def draw(distribution: Any, n: int) -> Tasks:
    tasks: Tasks = distribution.sample(n, generator=torch.Generator().manual_seed(0))
    return tasks


@pytest.mark.parametrize("fraction", [0.2, 0.7])
def test_a_study_spoils_its_fraction_of_the_tasks_by_its_scale(
    study: Study, fraction: float
) -> None:
    section = CorruptionSection(kind="outlier_scale", fraction=fraction, scale=9.0)
    spoilt = build_problem(study.model_copy(update={"corruption": section}), None).training
    clean = build_problem(study, None).training
    y, z = (draw(each, 2000)["support"][1] for each in (clean, spoilt))
    ratio = (z / y)[:, 0, 0]
    changed = ratio[ratio != 1]
    torch.testing.assert_close(changed, torch.full_like(changed, 9.0))
    assert abs(len(changed) / 2000 - fraction) < 0.06


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "shuffled_labels", "fraction": 1.0},
        {"kind": "outlier_scale", "fraction": 1.0, "scale": 9.0},
        {"kind": "label_noise", "fraction": 1.0, "scale": 0.5},
        {"kind": "foreign", "fraction": 1.0, "foreign": "lines"},
        {"kind": "foreign", "fraction": 1.0, "foreign": "fast_sines"},
        {"kind": "foreign", "fraction": 1.0, "foreign": "Spruce"},
    ],
)
def test_corruption_spoils_the_training_tasks_and_no_others(
    study: Study, keys: dict[str, Any]
) -> None:
    section = CorruptionSection(**keys)
    problem = build_problem(study, None)
    corrupted = build_problem(study.model_copy(update={"corruption": section}), None)
    clean, spoilt = (TrainingTasks(study, p, 3)(0)["support"] for p in (problem, corrupted))
    assert (clean[1] != spoilt[1]).flatten(1).any(1).all()
    for split in ("validation", "test"):
        expected, found = (evaluation_tasks(p, 4, split, 3) for p in (problem, corrupted))
        assert all(torch.equal(a, b) for a, b in zip(*map(tensors, (expected, found)), strict=True))


@pytest.mark.parametrize(
    ("tasks", "model", "keys", "words"),
    [
        (
            {"kind": "omniglot", "way": 2, "support_shots": 5},
            {"kind": "conv4"},
            {"kind": "outlier_scale", "scale": 10},
            "BatchNorm divides the scale",
        ),
        (
            {"kind": "omniglot", "way": 2, "support_shots": 5},
            {"kind": "mlp", "hidden": [4], "batch_norm": True},
            {"kind": "outlier_scale", "scale": 10},
            "BatchNorm divides the scale",
        ),
        (
            {"kind": "omniglot", "way": 2, "support_shots": 1},
            {"kind": "mlp", "hidden": [4]},
            {"kind": "shuffled_labels"},
            "of one example of each class are as good",
        ),
        (
            {"kind": "sine", "support_shots": 1},
            {"kind": "mlp", "hidden": [4]},
            {"kind": "shuffled_labels"},
            "of one example are as good",
        ),
    ],
)
def test_corruption_that_would_leave_the_training_as_it_is_is_refused(
    write_study: WriteStudy,
    tasks: dict[str, Any],
    model: dict[str, Any],
    keys: dict[str, Any],
    words: str,
) -> None:
    changes = {"tasks": tasks, "model": model, "inner": {"lr": 0.1, "steps": 1}}
    corruption = keys | {"fraction": 0.5}
    with pytest.raises(StudyError, match=words) as caught:
        load(str(write_study(**changes, corruption=corruption)))
    assert "\n" not in str(caught.value)
    load(str(write_study(**changes)))  # only the corruption was wrong
    if keys["kind"] == "shuffled_labels":  # of the support alone: MAML has a query set besides
        load(str(write_study(**changes, corruption=corruption, form={"kind": "maml"})))


@pytest.mark.parametrize("support", ["uniform", "shuffled_grid"])
def test_fast_sines_have_the_inputs_of_the_study_and_are_higher_and_faster(
    write_study: WriteStudy, support: str
) -> None:
    tasks = {"kind": "sine", "support": support, "support_shots": 10}
    corruption = {"kind": "foreign", "fraction": 1.0, "foreign": "fast_sines"}
    spoilt = build_problem(load(str(write_study(tasks=tasks, corruption=corruption))), None)
    x, y = draw(spoilt.training, 2000)["support"]
    assert x.shape == (2000, 10, 1)
    grid = torch.linspace(-5, 5, 10)
    assert torch.equal(x.squeeze(2).sort(1).values, grid.expand(2000, 10)) == (support != "uniform")
    # over a whole phase E[y²] = E[a²] / 2, of amplitudes from U[5, 15]
    assert y.square().mean().item() == pytest.approx((15**3 - 5**3) / 10 / 3 / 2, rel=0.1)
    foreign = spoilt.training.foreign
    amplitude, _, frequency = foreign.sample_parameters(2000, torch.Generator().manual_seed(0))
    for draws, low, high in ((amplitude, 5, 15), (frequency, 3, 6)):
        edge = 5 * (high - low) / 2000
        assert low <= draws.min() < low + edge and high - edge < draws.max() <= high


def test_noise_on_classes_is_refused_before_anything_is_read(write_study: WriteStudy) -> None:
    changes = {"tasks": {"kind": "omniglot", "way": 2, "support_shots": 5}}
    corruption = {"kind": "label_noise", "fraction": 0.5, "scale": 1.0}
    with pytest.raises(StudyError, match="classes take no noise; take shuffled_labels"):
        load(str(write_study(**changes, corruption=corruption)))


def test_real_data_that_spoil_a_study_are_part_of_its_digest(study: Study) -> None:
    def digest(**keys: Any) -> str | None:
        section = CorruptionSection(kind="foreign", fraction=0.5, **keys)
        return data_digest(build_problem(study.model_copy(update={"corruption": section}), None))

    digests = digest(foreign="Spruce"), digest(foreign="Milk")
    assert digest(foreign="lines") is None
    assert None not in digests and digests[0] != digests[1]
