"""Adam in the inner loop of a study, against torch.optim.Adam on one task after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradagree_opt as ga
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.forms import inner_loop
from gradagree_opt.ablation.training.networks import Params, initial_params, predict
from gradagree_opt.ablation.training.problem import Problem, TrainingTasks
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import train_runs

from ..conftest import WriteStudy
from .doubled import problem_of

NICHOL: dict[str, object] = {"optimizer": "adam", "lr": 0.01, "steps": 3, "betas": [0, 0.999]}
USUAL: dict[str, object] = {"optimizer": "adam", "lr": 0.01, "steps": 4, "batch_size": 5}


def loss_of(problem: Problem, params: Params, batch: Any) -> Tensor:
    x, y = batch
    return (predict(problem.module, params, x) - y).square().mean()


def adapted(study: Study, problem: Problem, params: Params, x: Tensor, y: Tensor) -> Params:
    inner = study.inner
    assert inner is not None
    at = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    betas = (0.9, 0.999) if inner.betas is None else tuple(inner.betas)
    optimizer = torch.optim.Adam(at.values(), lr=inner.lr, betas=betas)
    size = inner.batch_size or len(x)
    for step in range(inner.steps):
        part = slice(step * size % len(x), step * size % len(x) + size)
        optimizer.zero_grad()
        loss_of(problem, at, (x[part], y[part])).backward()
        optimizer.step()
    return {name: leaf.detach() for name, leaf in at.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("inner", [NICHOL, USUAL], ids=["Nichol's", "usual, on minibatches"])
def test_a_group_of_runs_is_the_loop_of_reptile_around_that_of_torch(
    write_study: WriteStudy, inner: dict[str, object]
) -> None:
    study = load(str(write_study(inner=inner, iterations=4)))
    problem = problem_of(study)
    runs = [
        Run(method=study.methods[0], rate=rate, seed=seed) for rate, seed in ((0.5, 3), (0.25, 5))
    ]
    for run, (_, found) in zip(runs, train_runs(study, problem, runs, lambda _: None), strict=True):
        source, params = TrainingTasks(study, problem, run.seed), initial_params(study, run.seed)
        for iteration in range(study.iterations):
            x, y = source(iteration)["support"]
            ends = [adapted(study, problem, params, *task) for task in zip(x, y, strict=True)]
            rate = run.rate * (1 - iteration / study.iterations)
            params = {
                name: leaf - rate * sum(leaf - end[name] for end in ends) / len(ends)
                for name, leaf in params.items()
            }
        # Adam's first step is as long for a gradient near zero: rounding there is not small.
        torch.testing.assert_close(found, params, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_in_first_order_the_gradient_is_that_of_the_query_where_the_task_ended(
    write_study: WriteStudy,
) -> None:
    form = {"kind": "maml", "first_order": True}
    study = load(str(write_study(inner=NICHOL, form=form)))
    problem, params = problem_of(study), initial_params(study, 0)
    assert study.inner is not None
    tasks = TrainingTasks(study, problem, 0)(0)
    maml = ga.MAML(
        lambda at, batch: loss_of(problem, at, batch), inner_loop(study.inner), first_order=True
    )
    found = maml.step(params, tasks, ga.Mean()).update
    total = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    for task in range(study.meta_batch):
        support, query = ([leaf[task] for leaf in tasks[part]] for part in ("support", "query"))
        end = adapted(study, problem, params, *support)
        end = {name: leaf.requires_grad_() for name, leaf in end.items()}
        grads = torch.autograd.grad(loss_of(problem, end, query), [*end.values()])
        for name, grad in zip(end, grads, strict=True):
            total[name] += grad / study.meta_batch
    torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"inner": {"lr": 0.02, "steps": 2, "betas": [0, 0.999]}}, "only Adam has betas"),
        ({"inner": NICHOL | {"betas": [0, 1]}}, "less than 1"),
        ({"inner": NICHOL | {"betas": [0.9]}}, "at least 2 in the list, found 1"),
        ({"inner": NICHOL | {"betas": [0.9, 0.99, 0.999]}}, "at most 2 in the list, found 3"),
        ({"inner": NICHOL, "form": {"kind": "meta-sgd"}}, "rates of its own"),
        ({"inner": NICHOL, "form": {"kind": "maml"}}, "first_order: true"),
        ({"inner": NICHOL, "form": {"kind": "anil"}}, "first_order: true"),
    ],
)
def test_what_adam_does_not_go_with_is_refused(
    write_study: WriteStudy, changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(StudyError, match=expected):
        load(str(write_study(**changes)))


def test_its_runs_are_filed_apart_and_those_of_sgd_as_before(write_study: WriteStudy) -> None:
    given: dict[str, object] = {"lr": 0.02, "steps": 2, "batch_size": 5}
    inners = [given | {"optimizer": "sgd"}, USUAL, NICHOL, given]
    studies = [load(str(write_study(inner=inner))) for inner in inners]
    keys = [Run(method=s.methods[0], rate=0.5, seed=3).key(s, None) for s in studies]
    assert keys[0] == keys[3] and len({*keys}) == 3
