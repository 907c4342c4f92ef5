"""Runs trained together against runs trained one by one, by torch.optim and the plain loop."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from gradagree_opt.adapters import plain

import gradagree_opt as ga
from gradagree_opt.ablation.section import Optimizer
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.sections import MAMLForm, ReptileForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import (
    Params,
    batch_loss,
    build_module,
    generator,
    initial_params,
)
from gradagree_opt.ablation.training.problem import TrainingTasks
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import train_runs

from .doubled import problem_of

EQUAL = {"aggregator": "equal_agreement", "options": {"damping": 0.1}}
METHODS = [
    *load("sine").methods,
    Method(name="softmax", aggregator="gradient_agreement", options={"normalization": "softmax"}),
    Method(name="leaf", aggregator="gradient_agreement", options={"scope": "leaf"}),
    Method(name="equal length", aggregator="mean", options={"match_norm": EQUAL}),
    Method(name="drop", aggregator="gradient_agreement", options={"nonfinite": "drop"}),
]
FORMS = {
    "Reptile": ReptileForm(kind="reptile"),
    "MAML": MAMLForm(kind="maml"),
    "FOMAML": MAMLForm(kind="maml", first_order=True),
    "MAML on gradients": MAMLForm(kind="maml", signal="gradient"),
}
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
}
RATES = {"sgd": (0.02, 0.01, 0.005), "adam": (0.01, 0.002, 0.004)}
# An optimizer knows nothing of the weights: each method in both forms, one with both optimizers.
CASES = [(m, form, o) for m in METHODS for form, o in (("Reptile", "sgd"), ("MAML", "adam"))]
CASES += [(METHODS[1], "Reptile", "adam"), (METHODS[1], "MAML", "sgd")]


pytestmark = pytest.mark.usefixtures("float64")


def ignore(_: int) -> None:
    pass


def runs_of(method: Method, rates: tuple[float, ...]) -> list[Run]:
    """Runs that differ in outer rate and seed, two of them of one seed."""
    seeds = (3, 5, 5, 7)
    return [
        Run(method=method, rate=rate, seed=seed) for rate, seed in zip(rates, seeds, strict=False)
    ]


def variant(study: Study, form: str, optimizer: str, **changes: object) -> Study:
    outer = study.outer.model_copy(update={"optimizer": optimizer})
    return study.model_copy(update={"form": FORMS[form], "outer": outer, **changes})


def one_by_one(study: Study, run: Run) -> tuple[Params, dict[str, float]]:
    """The trained parameters and the last diagnostics, by the loop that the README shows."""
    loss = batch_loss(study, build_module(study))
    inner = ga.InnerSGD(study.inner.lr, study.inner.steps, batch_size=study.inner.batch_size)
    form = study.form
    learner = (
        ga.MAML(loss, inner, first_order=form.first_order, signal=form.signal)
        if isinstance(form, MAMLForm)
        else ga.Reptile(loss, inner)
    )
    params = {name: leaf.requires_grad_() for name, leaf in initial_params(study, run.seed).items()}
    kind = OPTIMIZERS[run.method.outer or study.outer.optimizer]
    optimizer = kind(list(params.values()), lr=run.rate)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, study.iterations)
    last: list[dict[str, float]] = []

    def after_step(_: int, step: Any) -> None:
        linear.step()
        last[:] = [step.diagnostics.log()]

    tasks = TrainingTasks(study, problem_of(study), run.seed)
    aggregator = run.method.build(generator(run.seed, "weights"))
    plain.train(
        learner,
        params,
        tasks,
        optimizer,
        aggregator,
        iterations=study.iterations,
        callback=after_step,
    )
    return params, last[0]


def assert_same_params(found: Params, expected: Params) -> None:
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        torch.testing.assert_close(leaf, expected[name].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "form", "optimizer"), CASES, ids=lambda value: getattr(value, "name", value)
)
def test_runs_trained_together_are_the_runs_trained_one_by_one(
    study: Study, method: Method, form: str, optimizer: str
) -> None:
    study = variant(study, form, optimizer, iterations=5)
    runs = runs_of(method, RATES[optimizer])
    trained = train_runs(study, problem_of(study), runs, ignore)
    for run, (record, params) in zip(runs, trained, strict=True):
        expected, diagnostics = one_by_one(study, run)
        assert record.run == run
        assert_same_params(params, expected)
        assert record.curve[-1].diagnostics == pytest.approx(diagnostics, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("form", ["FOMAML", "MAML on gradients"])
def test_so_are_they_in_the_other_forms(study: Study, form: str) -> None:
    study = variant(study, form, "adam")
    runs = runs_of(METHODS[1], RATES["adam"])
    for run, (_, params) in zip(
        runs, train_runs(study, problem_of(study), runs, ignore), strict=True
    ):
        assert_same_params(params, one_by_one(study, run)[0])


@pytest.mark.parametrize(("own", "other"), [("momentum", "sgd"), ("adam", "sgd"), ("sgd", "adam")])
def test_a_method_is_trained_with_an_outer_optimizer_of_its_own(
    study: Study, own: Optimizer, other: str
) -> None:
    study = variant(study, "Reptile", other)
    runs = runs_of(METHODS[1].model_copy(update={"outer": own}), RATES["adam"])
    trained = train_runs(study, problem_of(study), runs, ignore)
    for run, (_, params) in zip(runs, trained, strict=True):
        assert_same_params(params, one_by_one(study, run)[0])


@pytest.mark.parametrize("index", [1, 8])
def test_the_records_of_a_group_are_those_of_each_run_alone(study: Study, index: int) -> None:
    study = study.model_copy(update={"iterations": 40})
    problem, runs = problem_of(study), runs_of(METHODS[index], RATES["sgd"])
    together = train_runs(study, problem, runs, ignore)
    for run, (record, params) in zip(runs, together, strict=True):
        [(alone, params_alone)] = train_runs(study, problem, [run], ignore)
        assert record.validation == pytest.approx(alone.validation, rel=1e-9)
        assert record.test == pytest.approx(alone.test, rel=1e-9)
        assert [point.iteration for point in record.curve] == list(range(0, 41, 2))
        for point, other in zip(record.curve, alone.curve, strict=True):
            assert (point.iteration, point.loss) == pytest.approx(
                (other.iteration, other.loss), rel=1e-9
            )
            assert point.diagnostics == pytest.approx(other.diagnostics, rel=1e-9, abs=1e-12)
        assert_same_params(params, params_alone)


@pytest.mark.parametrize("form", ["Reptile", "MAML"])
def test_a_run_that_diverges_ends_alone(study: Study, form: str) -> None:
    study = variant(study, form, "sgd", iterations=60)
    problem = problem_of(study)
    steps: list[int] = []
    lost, kept = runs_of(METHODS[1], (1e30, 0.25))
    together = train_runs(study, problem, [lost, kept], steps.append)
    assert sum(steps) == 2 * study.iterations
    [(alone, params)] = train_runs(study, problem, [kept], ignore)
    assert math.isfinite(alone.validation)
    assert together[1][0].validation == pytest.approx(alone.validation, rel=1e-9)
    assert_same_params(together[1][1], params)
    [(diverged, remains)] = train_runs(study, problem, [lost], ignore)
    assert repr(together[0][0].curve[-1].loss) == repr(diverged.curve[-1].loss)
    assert [p.iteration for p in together[0][0].curve] == [p.iteration for p in diverged.curve]
    assert diverged.curve[-1].iteration < study.iterations
    assert together[0][0].test == diverged.test == dict.fromkeys(study.test.steps, math.inf)
    for name, leaf in together[0][1].items():
        torch.testing.assert_close(leaf, remains[name], equal_nan=True)


def test_the_seconds_are_shared_among_the_runs(study: Study) -> None:
    runs = runs_of(METHODS[0], RATES["sgd"])
    records = [r for r, _ in train_runs(study, problem_of(study), runs, ignore)]
    assert len({record.seconds for record in records}) == 1
    assert records[0].seconds > 0
