"""The library's own aggregators as methods of a study."""

import pytest
import torch

import gradagree_opt as ga
from gradagree_opt.ablation.study.methods import AGGREGATORS, Method, Recipe
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import initial_params
from gradagree_opt.ablation.training.problem import build_problem
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import train_runs


def test_every_aggregator_of_the_core_is_a_method() -> None:
    public = {getattr(ga, name) for name in ga.__all__}
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, ga.Aggregator)}
    assert set(AGGREGATORS.values()) == kinds - {ga.Aggregator}


def test_the_sum_is_trained_as_the_mean_is_at_a_rate_as_many_times_higher_as_there_are_tasks(
    study: Study,
) -> None:
    study = study.model_copy(update={"meta_batch": 4})
    problem = build_problem(study, None)
    (_, summed), (_, averaged) = (
        train_runs(study, problem, [Run(method=method, rate=rate, seed=3)], lambda _: None)[0]
        for method, rate in (
            (Method(name="sum", aggregator="sum"), 0.125),
            (Method(name="mean", aggregator="mean"), 0.5),
        )
    )
    torch.testing.assert_close(summed, averaged)
    first = initial_params(study, 3)
    assert not any(torch.allclose(summed[name], first[name]) for name in first)


def test_a_method_is_checked_once_and_not_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Recipe] = []
    monkeypatch.setattr(Recipe, "check", lambda self: checked.append(self))
    method = Method(name="equal", aggregator="equal_agreement", options={"damping": 0.1})
    runs = [Run(method=method, rate=rate, seed=0) for rate in (0.1, 0.2)]
    assert checked == [method]
    assert all(run.method is method for run in runs)
    read = Run.model_validate_json(runs[0].model_dump_json())
    assert checked == [method, read.method]
