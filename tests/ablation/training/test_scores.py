"""Scores and agreement of given parameters, against plain loops over tasks and steps."""

from dataclasses import replace

import pytest
import torch

from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import initial_params, predict
from gradagree_opt.ablation.training.problem import (
    Problem,
    TrainingTasks,
    agreement_matrix,
    evaluation_tasks,
    scores_after,
    tasks_at_once,
)


def test_validation_and_test_tasks_differ_though_sine_has_one_stream(problem: Problem) -> None:
    validation = evaluation_tasks(problem, 5, "validation", 0)
    test = evaluation_tasks(problem, 5, "test", 0)
    assert not torch.equal(validation["query"][1], test["query"][1])


def test_scores_are_those_of_a_plain_loop_over_tasks_and_steps(
    study: Study, problem: Problem
) -> None:
    params, tasks = initial_params(study, 0), evaluation_tasks(problem, 4, "test", 0)
    scores = scores_after(problem, problem.score, params, tasks, [0, 1, 3])
    for task in range(4):
        (x, y), (x_test, y_test) = ((a[task], b[task]) for a, b in tasks.values())
        adapted = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        for step in range(4):
            if step in scores:
                error = (predict(problem.module, adapted, x_test) - y_test).square().mean()
                assert scores[step][task].item() == pytest.approx(error.item(), rel=1e-5)
            loss = (predict(problem.module, adapted, x) - y).square().mean()
            gradients = torch.autograd.grad(loss, list(adapted.values()))
            adapted = {
                name: (leaf - study.inner.lr * gradient).detach().requires_grad_()
                for (name, leaf), gradient in zip(adapted.items(), gradients, strict=True)
            }


def test_a_task_that_does_not_move_agrees_with_none_however_far_the_others_do(
    study: Study, problem: Problem
) -> None:
    zeros = {name: torch.zeros_like(leaf) for name, leaf in initial_params(study, 0).items()}
    x, y = TrainingTasks(study, problem, 3)(0)["support"]  # to zeros, only the output's bias moves
    sizes = torch.tensor([0.0, 1.0, -1e-25])  # the square of the last vanishes in float32
    matrix = agreement_matrix(problem, zeros, (x, y.abs() * sizes[:, None, None]))
    torch.testing.assert_close(matrix, sizes.sign().outer(sizes.sign()))


def test_adapting_some_tasks_at_a_time_gives_the_same_scores(
    study: Study, problem: Problem
) -> None:
    params, tasks = initial_params(study, 0), evaluation_tasks(problem, 7, "test", 0)
    few = replace(problem, chunk_size=3)
    expected = scores_after(problem, problem.score, params, tasks, [0, 2])
    found = scores_after(few, few.score, params, tasks, [0, 2])
    for step in expected:
        torch.testing.assert_close(found[step], expected[step])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sine", 31_360),
        ("omniglot-5way-1shot", 80),
        ("omniglot-20way-5shot", 4),
        ("mini-imagenet-5way-1shot", 2),
        ("mini-imagenet-5way-5shot", 1),
    ],
)
def test_as_many_tasks_are_adapted_at_once_as_have_four_hundred_drawings_of_inputs(
    name: str, expected: int
) -> None:
    assert tasks_at_once(load(name)) == expected
