"""Meta-SGD and ANIL in a study, against plain loops with autograd in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from typer.testing import CliRunner

import gradagree_opt as ga
from gradagree_opt.ablation.runs.sweep import Sweep
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.sections import MAMLForm, MetaSGDForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.forms import HeadOnly, head
from gradagree_opt.ablation.training.networks import Params, build_module, initial_params, predict
from gradagree_opt.ablation.training.problem import (
    Problem,
    TrainingTasks,
    evaluation_tasks,
    scores_after,
)
from gradagree_opt.ablation.training.run import CurvePoint, Run, RunRecord, Store, archive
from gradagree_opt.ablation.training.training import train_runs
from gradagree_opt.cli import app

from ..conftest import WriteStudy
from .doubled import problem_of

FORMS: dict[str, dict[str, object]] = {
    "Reptile": {"kind": "reptile"},
    "MAML": {"kind": "maml"},
    "FOMAML": {"kind": "maml", "first_order": True},
    "ANIL": {"kind": "anil"},
    "first-order ANIL": {"kind": "anil", "first_order": True},
    "Meta-SGD": {"kind": "meta-sgd"},
    "first-order Meta-SGD": {"kind": "meta-sgd", "first_order": True},
}
NEW = [name for name in FORMS if "MAML" not in name and name != "Reptile"]
INNER = {"lr": 0.02, "steps": 2}
OUTER = {"optimizer": "sgd", "rates": [0.001, 0.002]}


def ignore(_: object) -> None:
    pass


def study_of(write_study: WriteStudy, form: str, **changes: object) -> Study:
    return load(str(write_study(form=FORMS[form], inner=INNER, **changes)))


def loss_of(problem: Problem, params: Params, x: Tensor, y: Tensor) -> Tensor:
    return (predict(problem.module, params, x) - y).square().mean()


def adapted_by_hand(
    study: Study, problem: Problem, meta: Params, x: Tensor, y: Tensor, steps: int
) -> Params:
    """The network after plain steps, each on all of the support set, differentiable as asked."""
    form = study.form
    assert isinstance(form, MAMLForm | MetaSGDForm)
    rates = meta.get("lr", {})
    start = meta.get("params", meta)
    names = [name for name in start if form.kind == "meta-sgd" or name.startswith("3.")]  # the last
    params = dict(start)
    for _ in range(steps):
        at = {
            name: leaf.detach().requires_grad_() if form.first_order else leaf
            for name, leaf in params.items()
        }
        loss = loss_of(problem, at, x, y)
        gradients = torch.autograd.grad(
            loss, [at[name] for name in names], create_graph=not form.first_order
        )
        for name, gradient in zip(names, gradients, strict=True):
            params[name] = params[name] - rates.get(name, study.inner.lr) * gradient
    return params


def trained_by_hand(study: Study, problem: Problem, run: Run) -> Params:
    source = TrainingTasks(study, problem, run.seed)
    meta = initial_params(study, run.seed)
    for iteration in range(study.iterations):
        meta = tree_map(lambda leaf: leaf.detach().requires_grad_(), meta)
        tasks = source(iteration)
        losses = []
        for task in range(study.meta_batch):
            (x, y), (x_query, y_query) = ((a[task], b[task]) for a, b in tasks.values())
            adapted = adapted_by_hand(study, problem, meta, x, y, study.inner.steps)
            losses.append(loss_of(problem, adapted, x_query, y_query))
        gradients = iter(torch.autograd.grad(torch.stack(losses).mean(), tree_leaves(meta)))
        rate = run.rate * (1 - iteration / study.iterations)
        meta = tree_map(lambda leaf, rate=rate, g=gradients: leaf - rate * next(g), meta)
    return tree_map(lambda leaf: leaf.detach(), meta)


def runs_of(study: Study) -> list[Run]:
    pairs = ((0.02, 3), (0.01, 5))
    return [Run(method=study.methods[0], rate=rate, seed=seed) for rate, seed in pairs]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", NEW)
def test_a_group_of_runs_is_the_plain_loop_with_autograd(
    write_study: WriteStudy, form: str
) -> None:
    study = study_of(write_study, form, iterations=6)
    problem = problem_of(study)
    runs = runs_of(study)
    for run, (_, params) in zip(runs, train_runs(study, problem, runs, ignore), strict=True):
        expected = trained_by_hand(study, problem, run)
        torch.testing.assert_close(params, expected, rtol=1e-9, atol=1e-12)
        moved = tree_map(torch.sub, expected, initial_params(study, run.seed))
        assert all(leaf.abs().max() > 0 for leaf in tree_leaves(moved))  # the body learns too


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["ANIL", "Meta-SGD"])
def test_the_test_adapts_as_the_training_does(write_study: WriteStudy, form: str) -> None:
    study = study_of(write_study, form, iterations=6)
    problem = problem_of(study)
    [(_, params)] = train_runs(study, problem, runs_of(study)[:1], ignore)
    tasks = evaluation_tasks(problem, 4, "test", 0)
    scores = scores_after(problem, problem.score, params, tasks, [0, 1, 3])
    meta = tree_map(lambda leaf: leaf.detach().requires_grad_(), params)
    for task in range(4):
        (x, y), (x_test, y_test) = ((a[task], b[task]) for a, b in tasks.values())
        for steps, found in scores.items():
            adapted = adapted_by_hand(study, problem, meta, x, y, steps)
            expected = loss_of(problem, adapted, x_test, y_test).item()
            assert found[task].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["ANIL", "Meta-SGD"])
def test_the_agreement_matrix_is_that_of_the_networks_displacements(
    write_study: WriteStudy, form: str
) -> None:
    study = study_of(write_study, form, iterations=6)
    problem = problem_of(study)
    [(record, params)] = train_runs(study, problem, runs_of(study)[:1], ignore)
    x, y = TrainingTasks(study, problem, 3)(0)["support"]
    meta = tree_map(lambda leaf: leaf.detach().requires_grad_(), params)
    start, rows = meta.get("params", meta), []
    for task in range(study.meta_batch):
        adapted = adapted_by_hand(study, problem, meta, x[task], y[task], study.inner.steps)
        rows.append(torch.cat([(start[name] - adapted[name]).flatten() for name in start]))
    cosines = [[torch.cosine_similarity(a, b, dim=0).item() for b in rows] for a in rows]
    assert record.agreement is not None
    torch.testing.assert_close(
        torch.tensor(record.agreement), torch.tensor(cosines), atol=1e-3, rtol=0
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("first_order", [False, True])
def test_anil_is_maml_with_an_inner_rate_of_zero_for_the_body(
    write_study: WriteStudy, first_order: bool
) -> None:
    study = study_of(write_study, "ANIL")
    problem, params = problem_of(study), initial_params(study, 0)
    module = build_module(study)
    assert head(module) == {"3.weight", "3.bias"}

    def loss(params: Params, batch: Any) -> Tensor:
        return loss_of(problem, params, *batch)

    rates = {name: torch.tensor(0.1 * name.startswith("3.")) for name in params}
    tasks = TrainingTasks(study, problem, 0)(0)
    agree = ga.GradientAgreement()
    whole = ga.MAML(loss, ga.InnerSGD(rates, 3), first_order=first_order)
    only = HeadOnly(ga.InnerSGD(0.1, 3), head(module))
    found = ga.MAML(loss, only, first_order=first_order).step(params, tasks, agree)
    expected = whole.step(params, tasks, agree)
    torch.testing.assert_close(found.update, expected.update, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_quick_study_of_every_form_is_run_whole(
    write_study: WriteStudy, tmp_path: Path, form: str
) -> None:
    path = write_study(form=FORMS[form], inner=INNER, outer=OUTER)
    study = load(str(path), quick=True)
    results = Sweep(study, tmp_path / "out", None, ignore).run(1, ignore)
    for method in study.methods:
        for record in results.final(method.name):
            assert set(record.test) == {0, 1, 2}
            assert 0 < record.test[2] < 100
            assert record.agreement is not None


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_every_artefact_of_a_meta_sgd_study_is_written(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    path, out = write_study(form=FORMS["Meta-SGD"], inner=INNER, outer=OUTER), tmp_path / "out"
    arguments = ["ablate", str(path), "--quick", "--out", str(out), "--jobs", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (out / "adaptation.png").exists() and (out / "report.html").exists()
    text = (out / "methods.md").read_text()
    assert "Training was by Meta-SGD [@li2017meta]" in text
    assert "gradient descent at rates that begin at 0.02" in text


def test_parameters_and_rates_are_read_as_they_were_written(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    study = study_of(write_study, "Meta-SGD")
    params = initial_params(study, 3)
    assert params.keys() == {"params", "lr"}
    assert all((rate == 0.02).all() for rate in params["lr"].values())
    store = Store(tmp_path)
    record = RunRecord(
        run=runs_of(study)[0],
        validation=1.0,
        test={0: 1.0},
        curve=[CurvePoint(iteration=0, loss=1.0, diagnostics={})],
        seconds=0.0,
    )
    store.write("key", record, archive(params))
    torch.testing.assert_close(store.params("key"), params, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inner": {**INNER, "batch_size": 5}}, "'inner.batch_size': Meta-SGD takes each step"),
        (
            {
                "methods": [
                    {
                        "name": "mean",
                        "aggregator": "gradient_agreement",
                        "options": {"scope": "leaf"},
                    }
                ]
            },
            "'methods.0.options.scope': Meta-SGD's displacement",
        ),
        ({"form": {"kind": "meta_sgd"}}, "'meta-sgd'"),
        ({"form": {"kind": "meta-sgd", "signal": "gradient"}}, "unknown key 'signal'"),
    ],
)
def test_what_meta_sgd_cannot_do_is_one_sentence(
    write_study: WriteStudy, changes: dict[str, object], words: str
) -> None:
    keys = {"form": FORMS["Meta-SGD"], "inner": INNER, **changes}
    with pytest.raises(StudyError) as caught:
        load(str(write_study(**keys)))
    assert words in str(caught.value) and "\n" not in str(caught.value)
