"""What a table and the figure of an unseen sine show, from numbers made up or worked out here."""

import math

import numpy as np
import pytest
import torch

from gradagree_opt.ablation.report.figure_adaptation import adaptation
from gradagree_opt.ablation.report.report import build_report
from gradagree_opt.ablation.runs.sweep import Label, Part
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import initial_params, predict
from gradagree_opt.ablation.training.problem import build_problem, evaluation_tasks
from gradagree_opt.ablation.training.run import CurvePoint, Run, RunRecord

ACCURACIES = {"mean": 0.25, "agreement": 0.5, "clipped": 0.375}


def test_accuracies_are_in_percent_the_best_first() -> None:
    shipped = load("omniglot-5way-1shot")
    methods = [method for method in shipped.methods if method.name in ACCURACIES]
    study = shipped.model_copy(update={"methods": methods})
    records: dict[Label, RunRecord] = {}
    for method in methods:
        for seed in study.seeds:
            accuracy = ACCURACIES[method.name] + 0.01 * (seed - 2)
            record = RunRecord(
                run=Run(method=method, rate=1.0, seed=seed),
                validation=1.0,
                test=dict.fromkeys(study.test.steps, accuracy),
                curve=[CurvePoint(iteration=0, loss=1.0, diagnostics={})],
                agreement=None,
                seconds=1.0,
            )
            records[record.run.label] = record
    table = build_report([Part(study, records, dict.fromkeys(ACCURACIES, 1.0))]).summary
    assert [*table["method"]] == ["agreement", "clipped", "mean"]
    # the seeds lie 0.01 apart: s = 0.0158, and t at 4 degrees of freedom 2.776
    assert [*table["5 steps"]] == ["50.0 ± 2.0", "37.5 ± 2.0", "25.0 ± 2.0"]
    assert [cell.split(" ")[0] for cell in table["minus mean"]] == ["+25.0", "+12.5", ""]


def test_a_method_that_did_not_diverge_is_not_called_diverged_because_the_mean_has() -> None:
    shipped = load("sine")
    methods = [method for method in shipped.methods if method.name in ACCURACIES]
    study = shipped.model_copy(update={"methods": methods})
    lost = {("mean", 1), ("mean", 4), ("clipped", 1), ("clipped", 2)}
    records: dict[Label, RunRecord] = {}
    for method in methods:
        for seed in study.seeds:
            error = math.inf if (method.name, seed) in lost else 0.25
            record = RunRecord(
                run=Run(method=method, rate=1.0, seed=seed),
                validation=1.0,
                test=dict.fromkeys(study.test.steps, error),
                curve=[CurvePoint(iteration=0, loss=1.0, diagnostics={})],
                seconds=1.0,
            )
            records[record.run.label] = record
    report = build_report([Part(study, records, dict.fromkeys(ACCURACIES, 1.0))])
    rows = report.summary.set_index("method")["minus mean"]
    assert dict(rows) == {"agreement": "mean diverged", "mean": "", "clipped": "diverged"}
    assert 'Diverged: "mean" from 2 of 5 seeds, "clipped" from 2 of 5 seeds.' in report.notes


def test_a_method_is_shown_after_steps_on_the_support_points_alone(study: Study) -> None:
    problem, seed = build_problem(study, None), study.seeds[0]
    trained = {name: 2 * leaf for name, leaf in initial_params(study, seed).items()}
    results = Part(study, {}, {})
    axes = adaptation(results, problem, {"mean": trained}).axes[1]
    tasks = evaluation_tasks(problem, 1, "test", seed)
    (x, y), (shown, _) = ((a[0], b[0]) for a, b in tasks.values())
    params = {name: leaf.clone().requires_grad_() for name, leaf in trained.items()}
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    for step in range(6):
        label = "1 step" if step == 1 else f"{step} steps"
        expected = predict(problem.module, params, shown)[:, 0].detach().numpy()
        np.testing.assert_allclose(lines[label].get_ydata(), expected, rtol=1e-4, atol=1e-5)
        loss = (predict(problem.module, params, x) - y).square().mean()
        gradients = torch.autograd.grad(loss, list(params.values()))
        params = {
            name: (leaf - study.inner.lr * gradient).detach().requires_grad_()
            for (name, leaf), gradient in zip(params.items(), gradients, strict=True)
        }
    assert [*lines["points"].get_xdata()] == pytest.approx(x[:, 0].tolist())
