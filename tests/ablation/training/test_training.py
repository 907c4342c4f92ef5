"""One run: the same tasks for every method, determinism, divergence, and no test task seen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training import training as training_module
from gradagree_opt.ablation.training.networks import Params, initial_params, predict
from gradagree_opt.ablation.training.problem import Problem, Tasks, TrainingTasks, build_problem
from gradagree_opt.ablation.training.run import Run, RunRecord
from gradagree_opt.ablation.training.training import train_runs
from gradagree_opt.tasks import TaskDistribution


class Altered:
    """A distribution whose tasks go through a function of the tasks and the split."""

    def __init__(self, base: TaskDistribution, alter: Callable[[Tasks, str], Tasks]) -> None:
        self.base, self.alter = base, alter

    def sample(self, n_tasks: int, *, split: Any = "train", generator: torch.Generator) -> Tasks:
        return self.alter(self.base.sample(n_tasks, split=split, generator=generator), split)


def train_run(
    study: Study, problem: Problem, run: Run, report: Callable[[int], None]
) -> tuple[RunRecord, Params]:
    return train_runs(study, problem, [run], report)[0]


def run_of(study: Study, index: int = 0, *, rate: float = 0.5, seed: int = 3) -> Run:
    return Run(method=study.methods[index], rate=rate, seed=seed)


def ignore(_: int) -> None:
    pass


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_run_is_the_same_to_the_bit_whatever_was_run_before(
    study: Study, problem: Problem, index: int
) -> None:
    first, params = train_run(study, problem, run_of(study, index), ignore)
    train_run(study, problem, run_of(study, 2, seed=5), ignore)
    torch.manual_seed(99)
    again, params_again = train_run(study, build_problem(study, None), run_of(study, index), ignore)
    assert again.model_dump(exclude={"seconds"}) == first.model_dump(exclude={"seconds"})
    assert all(torch.equal(params[name], params_again[name]) for name in params)


def test_every_method_and_rate_of_a_seed_sees_the_same_tasks_in_the_same_order(
    study: Study, problem: Problem
) -> None:
    def seen(run: Run) -> list[torch.Tensor]:
        batches: list[torch.Tensor] = []

        def spy(tasks: Tasks, split: str) -> Tasks:
            batches.append(torch.cat([*tasks["support"], *tasks["query"]], dim=1))
            return tasks

        spied = replace(
            problem,
            training=Altered(problem.training, spy),
            evaluation=Altered(problem.evaluation, spy),
        )
        train_run(study, spied, run, ignore)
        return batches

    first = seen(run_of(study))
    for other in (seen(run_of(study, 1, rate=0.25)), seen(run_of(study, 2))):
        assert len(first) == len(other) == 4  # validation, train, test, agreement matrix
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    of_another_seed = seen(run_of(study, seed=5))
    assert not any(torch.equal(a, b) for a, b in zip(first, of_another_seed, strict=True))


def test_the_training_batches_are_a_stream_without_repeats(study: Study, problem: Problem) -> None:
    source = TrainingTasks(study, problem, 3)
    batches = [source(iteration)["support"][0] for iteration in range(2 * source.BLOCK)]
    assert all(len(batch) == study.meta_batch for batch in batches)
    assert len({batch.sum().item() for batch in batches}) == len(batches)


def test_training_and_validation_never_see_a_test_task(study: Study, problem: Problem) -> None:
    def plant(tasks: Tasks, split: str) -> Tasks:
        if split != "test":
            return tasks
        return {part: (x, torch.full_like(y, 1e6)) for part, (x, y) in tasks.items()}

    marked = replace(
        problem,
        training=Altered(problem.training, plant),
        evaluation=Altered(problem.evaluation, plant),
    )
    clean, clean_params = train_run(study, problem, run_of(study), ignore)
    found, params = train_run(study, marked, run_of(study), ignore)
    assert found.test[0] > 1e11
    assert (found.validation, found.curve) == (clean.validation, clean.curve)
    assert all(torch.equal(params[name], clean_params[name]) for name in params)


def test_the_agreement_matrix_has_the_cosines_of_plain_inner_loops(
    study: Study, problem: Problem
) -> None:
    record, params = train_run(study, problem, run_of(study), ignore)
    x, y = TrainingTasks(study, problem, 3)(0)["support"]
    rows = []
    for task in range(study.meta_batch):
        adapted = {name: leaf.double().requires_grad_() for name, leaf in params.items()}
        for step in range(study.inner.steps):
            part = slice(step * 5, step * 5 + 5)
            error = predict(problem.module, adapted, x[task, part].double()) - y[task, part]
            gradients = torch.autograd.grad(error.square().mean(), list(adapted.values()))
            adapted = {
                name: (leaf - study.inner.lr * gradient).detach().requires_grad_()
                for (name, leaf), gradient in zip(adapted.items(), gradients, strict=True)
            }
        rows.append(torch.cat([(params[name] - leaf).flatten() for name, leaf in adapted.items()]))
    cosines = [[torch.cosine_similarity(a, b, dim=0).item() for b in rows] for a in rows]
    assert record.agreement is not None
    torch.testing.assert_close(
        torch.tensor(record.agreement), torch.tensor(cosines), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_mean_run_is_a_plain_reptile_loop(
    study: Study, problem: Problem, schedule: Literal["constant", "linear"]
) -> None:
    outer = study.outer.model_copy(update={"schedule": schedule})
    study = study.model_copy(update={"outer": outer})
    record, trained = train_run(study, problem, run_of(study), ignore)
    params, source = initial_params(study, 3), TrainingTasks(study, problem, 3)
    for iteration in range(study.iterations):
        rate = 0.5 * (1 - iteration / study.iterations if schedule == "linear" else 1)
        x, y = source(iteration)["support"]
        displacement = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        for task in range(study.meta_batch):
            adapted = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
            for rows in (slice(0, 5), slice(5, 10)):
                error = predict(problem.module, adapted, x[task, rows]) - y[task, rows]
                gradients = torch.autograd.grad(error.square().mean(), list(adapted.values()))
                adapted = {
                    name: (leaf - 0.02 * gradient).detach().requires_grad_()
                    for (name, leaf), gradient in zip(adapted.items(), gradients, strict=True)
                }
            for name, leaf in params.items():
                displacement[name] += (adapted[name].detach() - leaf) / study.meta_batch
        params = {name: leaf + rate * displacement[name] for name, leaf in params.items()}
    for name, leaf in trained.items():
        torch.testing.assert_close(leaf.detach(), params[name], rtol=1e-4, atol=1e-6)
    assert record.curve[-1].iteration == study.iterations


def test_a_run_that_diverges_is_recorded_as_infinite_and_reported_to_its_end(
    study: Study, problem: Problem
) -> None:
    steps: list[int] = []
    record, _ = train_run(study, problem, run_of(study, rate=1e30), steps.append)
    assert record.validation == float("inf")
    assert set(record.test.values()) == {float("inf")}
    assert record.curve[-1].iteration < study.iterations
    assert sum(steps) == study.iterations


def test_a_run_that_overflows_on_test_tasks_alone_is_infinite_there(
    study: Study, problem: Problem
) -> None:
    def overflow(outputs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.where(outputs.abs().amax() > 0, torch.nan, 0.0)

    record, _ = train_run(study, replace(problem, score=overflow), run_of(study), ignore)
    assert set(record.test.values()) == {float("inf")} and record.validation < float("inf")


def test_a_run_is_on_one_thread_from_end_to_end_and_the_threads_are_as_before(
    study: Study, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def spied(function: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*arguments: Any) -> Any:
            threads.append(torch.get_num_threads())
            return function(*arguments)

        return spy

    for name in ("Program", "scores_of_runs", "matrices_of_runs"):
        monkeypatch.setattr(training_module, name, spied(getattr(training_module, name)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_run(study, problem, run_of(study), ignore)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(threads) > 3 and set(threads) == {1}


def test_a_maml_study_lowers_its_loss_with_adam(study: Study) -> None:
    shipped = load("sine-maml", quick=True)
    test = shipped.test.model_copy(update={"tasks": 4, "steps": [1]})
    small = shipped.model_copy(update={"iterations": 60, "meta_batch": 4, "test": test})
    run = Run(method=Method(name="mean", aggregator="mean"), rate=0.01, seed=0)
    record, _ = train_run(small, build_problem(small, None), run, ignore)
    assert record.validation < 0.95 * record.curve[0].loss


def test_photographs_are_drawn_one_step_at_a_time(study: Study, problem: Problem) -> None:
    drawn: list[int] = []

    def spy(tasks: Tasks, _: str) -> Tasks:
        drawn.append(len(tasks["support"][0]))
        return tasks

    shipped = load("mini-imagenet-5way-1shot")
    source = TrainingTasks(shipped, replace(problem, training=Altered(problem.training, spy)), 0)
    batches = [source(iteration)["support"][0] for iteration in range(4)]
    assert drawn == [shipped.meta_batch] * 4
    assert len({batch.sum().item() for batch in batches}) == 4
