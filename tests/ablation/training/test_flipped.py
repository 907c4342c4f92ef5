"""Tasks that report a multiple of their displacement, against a plain loop in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradagree_opt.ablation.report.citations import methods_text
from gradagree_opt.ablation.runs.store import Config
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import Params, initial_params, predict
from gradagree_opt.ablation.training.problem import (
    Problem,
    TrainingTasks,
    agreement_matrix,
    build_problem,
    evaluation_tasks,
)
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import train_runs

from .doubled import problem_of

WriteStudy = Callable[..., Path]
FLIPPED = {"kind": "flipped", "fraction": 0.4, "scale": 2.0}
METHODS = [
    {"name": "mean", "aggregator": "mean"},
    {"name": "agreement", "aggregator": "gradient_agreement"},
]


@pytest.fixture
def flipped(write_study: WriteStudy) -> Study:
    return load(str(write_study(corruption=FLIPPED, methods=METHODS, meta_batch=4)))


def clean(study: Study) -> Study:
    return study.model_copy(update={"corruption": None})


def displacement(
    study: Study, problem: Problem, params: Params, x: Tensor, y: Tensor
) -> list[Tensor]:
    """How far plain gradient descent goes on the sub-batches of a support set."""
    at = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    size = study.inner.batch_size
    for step in range(study.inner.steps):
        rows = slice(step * size % len(x), step * size % len(x) + size)
        loss = (predict(problem.module, at, x[rows]) - y[rows]).square().mean()
        gradients = torch.autograd.grad(loss, list(at.values()))
        at = {
            name: (leaf - study.inner.lr * gradient).detach().requires_grad_()
            for (name, leaf), gradient in zip(at.items(), gradients, strict=True)
        }
    return [(params[name] - leaf).detach() for name, leaf in at.items()]


def weights(method: str, reported: list[list[Tensor]]) -> list[float]:
    if method == "mean":
        return [1 / len(reported)] * len(reported)
    rows = [torch.cat([leaf.flatten() for leaf in leaves]) for leaves in reported]
    scores = [sum(float(row @ other) for other in rows) for row in rows]
    return [score / sum(map(abs, scores)) for score in scores]


def trained_by_hand(study: Study, problem: Problem, run: Run) -> Params:
    source, params = TrainingTasks(study, problem, run.seed), initial_params(study, run.seed)
    for iteration in range(study.iterations):
        x, y, factors = source(iteration)["support"]
        reported = [
            [factor * leaf for leaf in displacement(study, problem, params, x[task], y[task])]
            for task, factor in enumerate(factors.tolist())
        ]
        weighed = weights(run.method.name, reported)
        rate = run.rate * (1 - iteration / study.iterations)
        for weight, leaves in zip(weighed, reported, strict=True):
            steps = zip(params.items(), leaves, strict=True)
            params = {name: leaf - rate * weight * each for (name, leaf), each in steps}
    return params


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("index", [0, 1])
def test_a_group_of_runs_with_flipped_tasks_is_the_plain_loop(flipped: Study, index: int) -> None:
    study = flipped
    problem = problem_of(study)
    pairs = ((0.5, 3), (0.25, 5))
    runs = [Run(method=study.methods[index], rate=rate, seed=seed) for rate, seed in pairs]
    for run, (_, params) in zip(
        runs, train_runs(study, problem, runs, lambda _: None), strict=True
    ):
        torch.testing.assert_close(params, trained_by_hand(study, problem, run))


@pytest.mark.compiled
def test_a_captured_group_with_flipped_tasks_is_the_eager_one(
    flipped: Study, without_code_generation: None
) -> None:
    runs = [Run(method=flipped.methods[1], rate=0.5, seed=seed) for seed in (3, 5)]
    found, expected = (
        train_runs(study, build_problem(study, None), runs, lambda _: None)
        for study in (flipped.model_copy(update={"compile": value}) for value in (True, False))
    )
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_each_task_is_flipped_with_the_given_probability_and_its_examples_stay(
    flipped: Study,
) -> None:
    problem = build_problem(flipped, None)
    spoilt, honest = (TrainingTasks(study, problem, 3) for study in (flipped, clean(flipped)))
    factors = []
    for iteration in range(500):
        *examples, factor = spoilt(iteration)["support"]
        assert all(map(torch.equal, examples, honest(iteration)["support"]))
        factors.append(factor)
    factors = torch.cat(factors)
    assert set(factors.tolist()) == {1.0, -2.0}
    assert abs((factors == -2).double().mean().item() - 0.4) < 5 * (0.4 * 0.6 / 2000) ** 0.5


def test_validation_and_test_tasks_are_adapted_to_as_without_corruption(flipped: Study) -> None:
    problems = [build_problem(study, None) for study in (flipped, clean(flipped))]
    params = initial_params(flipped, 3)
    for split in ("validation", "test"):
        tasks = [evaluation_tasks(problem, 3, split, 3)["support"] for problem in problems]
        assert all(map(torch.equal, *tasks))
        x, y = (leaf[0] for leaf in tasks[0])
        ours, theirs = (problem.evaluator.adapt(params, (x, y), steps=2) for problem in problems)
        assert all(torch.equal(ours[name], theirs[name]) for name in params)


def test_the_agreement_matrix_shows_what_tasks_report(flipped: Study) -> None:
    params = initial_params(flipped, 3)
    problem = build_problem(flipped, None)
    support = TrainingTasks(flipped, problem, 3)(0)["support"]
    signs = support[2].sign()
    assert len(set(signs.tolist())) == 2
    honest = agreement_matrix(build_problem(clean(flipped), None), params, support[:2])
    found = agreement_matrix(problem, params, support)
    torch.testing.assert_close(found, honest * signs * signs.unsqueeze(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["maml", "anil", "meta-sgd"])
def test_flipped_tasks_in_another_form_are_refused(write_study: WriteStudy, form: str) -> None:
    changes: dict[str, Any] = {"form": {"kind": form}, "inner": {"lr": 0.02, "steps": 2}}
    with pytest.raises(StudyError, match="only Reptile's tasks report their displacements") as e:
        load(str(write_study(**changes, corruption=FLIPPED)))
    assert "\n" not in str(e.value)
    load(str(write_study(**changes)))  # only the corruption was wrong


def test_the_methods_text_says_what_flipped_tasks_report(flipped: Study, finished: Path) -> None:
    config = Config.model_validate_json((finished / "config.json").read_text())
    text = methods_text(config.model_copy(update={"study": flipped}))
    assert "0.4 was corrupted (flipped: each reported -2 times its displacement)." in text
