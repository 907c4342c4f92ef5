"""TorchJD's aggregators as methods of a study, against a plain loop with TorchJD itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gradagree_opt import frameworks
from gradagree_opt.ablation.runs.sweep import Sweep
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method, torchjd_aggregators
from gradagree_opt.ablation.study.sections import MAMLForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.grouping import groups
from gradagree_opt.ablation.training.networks import Params, derived_seed, initial_params, predict
from gradagree_opt.ablation.training.problem import TrainingTasks, build_problem
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import train_runs
from gradagree_testing.command import gradagree

from ..conftest import WriteStudy

pytest.importorskip("torchjd", reason="torchjd is not installed")

from torchjd import aggregation as jd

OPTIONS: dict[str, dict[str, bool | float | str]] = {
    "AlignedMTL": {"scale_mode": "rmse"},
    "CAGrad": {"c": 0.5},
    "FairGrad": {"alpha": 1},
    "GradVac": {"beta": 0.25},
    "Krum": {"n_byzantine": 1, "n_selected": 2},
    "NashMTL": {"n_tasks": 4, "optim_niter": 3},
    "TrimmedMean": {"trim_number": 1},
}
NAMES = [name.removeprefix("torchjd.") for name in torchjd_aggregators()]


def method_of(name: str) -> Method:
    return Method(name=name, aggregator=f"torchjd.{name}", options=OPTIONS.get(name, {}))


def runs_of(*names: str) -> list[Run]:
    return [
        Run(method=method_of(name), rate=rate, seed=seed)
        for name in names
        for rate, seed in ((0.25, 3), (0.5, 3), (0.5, 5))
    ]


def ignore(_: object) -> None:
    pass


@pytest.fixture
def study(study: Study) -> Study:
    return study.model_copy(update={"meta_batch": 4, "iterations": 5})


def test_every_aggregator_of_torchjd_that_is_complete_is_a_method() -> None:
    incomplete = {"Aggregator", "Constant", "GramianWeightedAggregator", "WeightedAggregator"}
    public = {name for name in jd.__all__ if not name.endswith("Weighting")}
    assert set(NAMES) == public - incomplete


def by_torchjd_alone(study: Study, run: Run) -> Params:
    """The Reptile loop on flat vectors, each displacement a row of TorchJD's matrix."""
    name = run.method.name
    aggregator = getattr(jd, name)(**run.method.whole_options())
    problem, params = build_problem(study, None), initial_params(study, run.seed)
    source = TrainingTasks(study, problem, run.seed)
    torch.manual_seed(derived_seed(run.seed, "weights"))
    for iteration in range(study.iterations):
        x, y = source(iteration)["support"]
        rows = []
        for task in range(study.meta_batch):
            adapted = params
            for part in (slice(0, 5), slice(5, 10)):
                leaves = {key: leaf.clone().requires_grad_() for key, leaf in adapted.items()}
                error = predict(problem.module, leaves, x[task, part]) - y[task, part]
                gradients = torch.autograd.grad(error.square().mean(), list(leaves.values()))
                adapted = {
                    key: leaf - study.inner.lr * gradient
                    for (key, leaf), gradient in zip(adapted.items(), gradients, strict=True)
                }
            rows.append(torch.cat([(params[key] - adapted[key]).flatten() for key in params]))
        matrix = torch.stack(rows)
        if name not in {"FairGrad", "NashMTL", "PCD", "ExcessMTL"}:  # as from_torchjd does
            unit = matrix.norm(dim=1).max()
            update = unit * aggregator(matrix / unit)
        else:
            update = aggregator(matrix)
        rate = run.rate * (1 - iteration / study.iterations)
        parts = update.split([leaf.numel() for leaf in params.values()])
        params = {
            key: leaf - rate * part.view_as(leaf)
            for (key, leaf), part in zip(params.items(), parts, strict=True)
        }
    return params


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_the_plain_loop_with_torchjd(study: Study, name: str) -> None:
    run = runs_of(name)[1]
    [(record, params)] = train_runs(study, build_problem(study, None), [run], ignore)
    expected = by_torchjd_alone(study, run)
    for key, leaf in params.items():
        torch.testing.assert_close(leaf, expected[key], rtol=1e-3, atol=1e-5)
    assert record.curve[-1].iteration == study.iterations


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["UPGrad", "PCGrad", "GradDrop"])
def test_a_maml_study_asked_to_compile_trains_them_as_they_are(study: Study, name: str) -> None:
    study = study.model_copy(update={"form": MAMLForm(kind="maml"), "compile": True})
    run = runs_of(name)[0]
    [(_, params)] = train_runs(study, build_problem(study, None), [run], ignore)
    eager = study.model_copy(update={"compile": False})
    [(_, expected)] = train_runs(eager, build_problem(eager, None), [run], ignore)
    assert all(torch.equal(params[key], expected[key]) for key in expected)
    assert not torch.equal(params["1.weight"], initial_params(study, run.seed)["1.weight"])


def test_they_are_trained_one_by_one_beside_groups_of_the_others() -> None:
    mean = Method(name="mean", aggregator="mean")
    others = [Run(method=mean, rate=0.5, seed=seed) for seed in range(6)]
    found = groups(others + runs_of("UPGrad", "Mean"), 8)
    assert sorted(len(group) for group in found) == [1] * 6 + [6]


@pytest.mark.slow
def test_random_and_stateful_ones_are_the_same_in_any_order_and_number_of_processes(
    study: Study, tmp_path: Path
) -> None:
    names = ["PCGrad", "GradVac", "GradDrop", "ExcessMTL"]
    methods = [method_of(name) for name in names]
    study = study.model_copy(update={"methods": methods, "baseline": "PCGrad", "iterations": 5})
    turned = study.model_copy(update={"methods": methods[::-1]})
    torch.manual_seed(1)
    alone = Sweep(study, tmp_path / "alone", None, ignore).run(1, ignore)
    torch.manual_seed(2)
    others = Sweep(turned, tmp_path / "turned", None, ignore).run(1, ignore)
    processes = Sweep(study, tmp_path / "processes", None, ignore).run(2, ignore)
    for label, record in alone.records.items():
        for found in (others.records[label], processes.records[label]):
            assert repr(found.model_copy(update={"seconds": record.seconds})) == repr(record)


def test_two_seeds_draw_other_random_numbers_and_leave_the_global_generator(study: Study) -> None:
    problem, state = build_problem(study, None), torch.random.get_rng_state()
    first, second = (
        train_runs(study, problem, [run], ignore)[0][0].curve[-1].diagnostics
        for run in runs_of("Random")[1:]
    )
    assert first["weight_sum"] == pytest.approx(second["weight_sum"])
    assert first["effective_tasks"] != second["effective_tasks"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_rate_at_which_one_diverges_is_a_result(study: Study) -> None:
    study = study.model_copy(update={"iterations": 40})
    for name in ("UPGrad", "NashMTL", "FairGrad", "AlignedMTL", "GradVac", "ConFIG"):
        run = Run(method=method_of(name), rate=1e30, seed=3)
        [(record, _)] = train_runs(study, build_problem(study, None), [run], ignore)
        assert record.validation == float("inf"), name


@pytest.mark.parametrize(
    ("keys", "line", "words"),
    [
        ("aggregator: torchjd.UPGard", 1, "'torchjd.UPGard'; there are torchjd.AlignedMTL"),
        ("aggregator: torchjd.Constant", 1, "unknown aggregator 'torchjd.Constant'"),
        ("aggregator: torchjd.CAGrad", 0, "'c' is missing; torchjd.CAGrad has c, norm_eps"),
        ("aggregator: torchjd.CAGrad\n    options: {d: 1}", 2, "unknown option 'd'"),
        ("aggregator: torchjd.UPGrad\n    options: {pref_vector: 1}", 2, "has none"),
        ("aggregator: torchjd.GradVac\n    options: {beta: 7}", 2, "beta"),
        ("aggregator: torchjd.Krum\n    options: {n_byzantine: 5}", 2, "at least 8 rows"),
        ("aggregator: torchjd.NashMTL\n    options: {n_tasks: 9}", 2, "a batch of 3 tasks: "),
        ("aggregator: torchjd.NashMTL\n    options: {n_tasks: 2.5}", 2, "integer"),
        ("aggregator: upgrad", 1, "random_weights, and TorchJD's as torchjd.UPGrad"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_a_mistake_is_one_sentence_naming_file_and_line(
    study_file: Path, keys: str, line: int, words: str
) -> None:
    text = study_file.read_text()
    place = "baseline: mean\n"
    study_file.write_text(text.replace(place, f"  - name: other\n    {keys}\n{place}"))
    first = text[: text.index(place)].count("\n") + 1
    with pytest.raises(StudyError) as caught:
        load(str(study_file))
    message = str(caught.value)
    assert f"{study_file}, line {first + line} in" in message
    assert words in message
    assert "\n" not in message


def test_without_torchjd_a_study_is_read_and_its_run_refused_with_the_command(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_new = frameworks.FRAMEWORKS["torchjd"]._replace(supported=">=99")
    monkeypatch.setitem(frameworks.FRAMEWORKS, "torchjd", too_new)
    torchjd_aggregators.cache_clear()  # found by other tests
    methods = [{"name": "UPGrad", "aggregator": "torchjd.UPGrad"}]
    study = load(str(write_study(methods=methods, baseline="UPGrad")))
    with pytest.raises(StudyError, match=r"'UPGrad': expected torchjd>=99, .*pip install") as error:
        Sweep(study, tmp_path / "out", None, ignore)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_study_of_others_does_not_import_torchjd(study_file: Path) -> None:
    program = (
        "import sys\n"
        "from gradagree_opt.ablation.study.loading import load\n"
        f"load({str(study_file)!r})\n"
        "assert 'torchjd' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.usefixtures("without_figures")
def test_nash_mtl_on_gradients_of_zero_goes_on_as_the_mean_does(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    method = {"name": "nash", "aggregator": "torchjd.NashMTL", "options": {"n_tasks": 3}}
    study = write_study(
        methods=[{"name": "mean", "aggregator": "mean"}, method],
        inner={"lr": 1e-44, "steps": 1},  # by which no parameter moves
    )
    result = gradagree("ablate", study, "--out", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 0
    found: dict[str, list[Any]] = {"mean": [], "nash": []}
    for path in tmp_path.glob("out/runs/*.json"):
        record = json.loads(path.read_text())
        run = record["run"]
        found[run["method"]["name"]].append((run["rate"], run["seed"], record["validation"]))
    assert sorted(found["nash"]) == sorted(found["mean"]) != []
