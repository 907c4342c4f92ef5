"""Multi-task learning in a study, against plain loops with autograd and torch.optim in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from gradagree_opt.ablation.section import Optimizer
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import Params, build_module, initial_params
from gradagree_opt.ablation.training.problem import (
    Problem,
    TrainingTasks,
    build_problem,
    evaluation_tasks,
    scores_after,
)
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import train_runs
from gradagree_opt.tasks import DigitPairs

from ..conftest import WriteStudy
from ..spied import trained_alike


def ignore(_: object) -> None:
    pass


def problem_of(study: Study) -> Problem:
    def doubled(query_shots: int) -> DigitPairs:
        shots = {"support_shots": study.tasks.support_shots, "query_shots": query_shots}
        return DigitPairs.from_scikit_learn(**shots, dtype=torch.float64)

    problem = build_problem(study, None)
    return replace(problem, training=doubled(1), evaluation=doubled(study.test.query_shots))


def outputs(trunk: Params, heads: Params, task: int, x: Tensor) -> Tensor:
    """Three layers written out, the last one that of the task."""
    for layer in ("1", "3"):
        x = torch.tanh(x.flatten(1) @ trunk[f"{layer}.weight"].T + trunk[f"{layer}.bias"])
    return x @ heads["5.weight"][task].T + heads["5.bias"][task]


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def weights_by_hand(method: str, rows: list[Tensor]) -> list[float]:
    """The paper's, by inner products one by one; Equal Agreement's, by a linear solve."""
    if method == "mean":
        return [1 / len(rows)] * len(rows)
    if method == "equal":
        n, norms = len(rows), torch.stack([row.norm() for row in rows])
        units = torch.stack(rows) / norms.unsqueeze(1)
        damped = units @ units.T / n + 0.01 * torch.eye(n)
        shares = torch.linalg.solve(damped, torch.full((n,), 1 / n))
        return (1.01 * shares * median(norms.tolist()) / norms).tolist()
    if method == "cosine":
        rows = [row / row.norm() for row in rows]
    scores = [sum(float(row @ other) for other in rows) for row in rows]
    return [score / sum(map(abs, scores)) for score in scores]


def trained_by_hand(study: Study, problem: Problem, run: Run) -> Params:
    """Task after task: the trunk by the weights, each head by a sixth of its own gradient."""
    source, params = TrainingTasks(study, problem, run.seed), initial_params(study, run.seed)
    for iteration in range(study.iterations):
        params = tree_map(lambda leaf: leaf.detach().requires_grad_(), params)
        trunk, heads = params["trunk"], params["heads"]
        x, y = source(iteration)["support"]
        of_trunk, of_heads = [], []
        for task in range(6):
            loss = functional.cross_entropy(outputs(trunk, heads, task, x[task]), y[task])
            leaves = [*trunk.values(), *heads.values()]
            gradients = torch.autograd.grad(loss, leaves)
            of_trunk.append(gradients[: len(trunk)])
            of_heads.append([gradient[task] for gradient in gradients[len(trunk) :]])
        weights = weights_by_hand(run.method.name, [flat(each) for each in of_trunk])
        rate = run.rate * (1 - iteration / study.iterations)
        moved: Params = {"trunk": {}, "heads": {}}
        for place, (name, leaf) in enumerate(trunk.items()):
            update = sum(w * each[place] for w, each in zip(weights, of_trunk, strict=True))
            moved["trunk"][name] = leaf - rate * update
        for place, (name, leaf) in enumerate(heads.items()):
            moved["heads"][name] = leaf - rate * torch.stack([h[place] / 6 for h in of_heads])
        params = moved
    return tree_map(lambda leaf: leaf.detach(), params)


def runs_of(method: Method) -> list[Run]:
    pairs = ((0.5, 3), (1.0, 3), (1.0, 5))
    return [Run(method=method, rate=rate, seed=seed) for rate, seed in pairs]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_group_of_runs_is_the_plain_loop_over_tasks_with_autograd(
    digits: Study, index: int
) -> None:
    problem, runs = problem_of(digits), runs_of(digits.methods[index])
    for run, (_, params) in zip(runs, train_runs(digits, problem, runs, ignore), strict=True):
        expected = trained_by_hand(digits, problem, run)
        torch.testing.assert_close(params, expected, rtol=1e-9, atol=1e-12)
        start = initial_params(digits, run.seed)
        moved = tree_map(lambda a, b: (a - b).abs().amax(-1).min().item(), expected, start)
        assert min(moved["heads"].values()) > 0  # that of every task


class Network(nn.Module):
    """A trunk and six heads as modules of their own."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(144, 7), nn.Tanh(), nn.Linear(7, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 10) for _ in range(6))
        self.trunk.load_state_dict(params["trunk"])
        for task, head in enumerate(self.heads):
            head.load_state_dict(
                {
                    "weight": params["heads"]["5.weight"][task],
                    "bias": params["heads"]["5.bias"][task],
                }
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x).tanh()
        return [head(features) for head in self.heads]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("outer", "optimizer"),
    [
        (None, torch.optim.SGD),
        ("momentum", partial(torch.optim.SGD, momentum=0.9)),
        ("adam", torch.optim.Adam),
    ],
)
def test_the_mean_is_plain_training_on_the_mean_loss(
    digits: Study, outer: Optimizer | None, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    problem = problem_of(digits)
    run = Run(method=Method(name="mean", aggregator="mean", outer=outer), rate=0.05, seed=3)
    [(record, params)] = train_runs(digits, problem, [run], ignore)
    source, network = TrainingTasks(digits, problem, 3), Network(initial_params(digits, 3))
    stepper = optimizer(network.parameters(), lr=run.rate)
    linear = torch.optim.lr_scheduler.LinearLR(stepper, 1.0, 0.0, digits.iterations)
    for iteration in range(digits.iterations):
        x, y = source(iteration)["support"]
        losses = [
            functional.cross_entropy(output, targets)
            for output, targets in zip(network(x[0]), y, strict=True)
        ]
        stepper.zero_grad()
        (sum(losses) / 6).backward()
        stepper.step()
        linear.step()
    expected = Network(params).state_dict()
    torch.testing.assert_close(network.state_dict(), expected, rtol=1e-9, atol=1e-12)
    tasks = evaluation_tasks(problem, 6, "validation", 3)
    x, y = tasks["query"]
    loss = sum(functional.cross_entropy(o, t) for o, t in zip(network(x[0]), y, strict=True)) / 6
    assert record.validation == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.usefixtures("float64")
def test_whatever_the_aggregator_a_head_takes_the_same_first_step(digits: Study) -> None:
    study = digits.model_copy(update={"iterations": 1})
    problem = problem_of(study)
    found = [
        train_runs(study, problem, [Run(method=method, rate=0.5, seed=3)], ignore)[0][1]
        for method in study.methods
    ]
    for params in found[1:]:
        torch.testing.assert_close(params["heads"], found[0]["heads"], rtol=1e-12, atol=1e-14)
        assert not torch.equal(params["trunk"]["1.weight"], found[0]["trunk"]["1.weight"])


@pytest.mark.usefixtures("float64")
def test_a_method_of_torchjd_combines_the_gradients_of_the_trunk(digits: Study) -> None:
    torchjd = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    study = digits.model_copy(update={"iterations": 1})
    problem = problem_of(study)
    run = Run(method=Method(name="MGDA", aggregator="torchjd.MGDA"), rate=1.0, seed=3)
    [(_, params)] = train_runs(study, problem, [run], ignore)
    start = tree_map(lambda leaf: leaf.requires_grad_(), initial_params(study, 3))
    x, y = TrainingTasks(study, problem, 3)(0)["support"]
    rows = [
        flat(
            torch.autograd.grad(
                functional.cross_entropy(outputs(**start, task=task, x=x[task]), y[task]),
                list(start["trunk"].values()),
            )
        )
        for task in range(6)
    ]
    update = torchjd.MGDA()(torch.stack(rows) / max(row.norm() for row in rows))
    moved = flat(tuple(start["trunk"][name] - params["trunk"][name] for name in start["trunk"]))
    expected = update * max(row.norm() for row in rows)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_the_score_is_the_mean_accuracy_of_the_tasks_on_the_test_pictures(digits: Study) -> None:
    study = digits.model_copy(update={"iterations": 80})
    problem = problem_of(study)
    run = Run(method=study.methods[0], rate=1.0, seed=3)
    [(record, params)] = train_runs(study, problem, [run], ignore)
    tasks = evaluation_tasks(problem, 6, "test", 3)
    x, y = tasks["query"]
    shares = []
    for task in range(6):
        rows = outputs(params["trunk"], params["heads"], task, x[task]).tolist()
        guessed = [row.index(max(row)) for row in rows]
        shares.append(sum(a == b for a, b in zip(guessed, y[task].tolist(), strict=True)) / 40)
    assert record.test == {0: pytest.approx(sum(shares) / 6)}
    assert len(set(shares)) > 1 and sum(shares) / 6 > 0.15
    found = scores_after(problem, problem.score, params, tasks, [0])
    assert found[0].tolist() == pytest.approx(shares)


@pytest.mark.usefixtures("float64")
def test_the_agreement_matrix_has_the_cosines_of_the_gradients_in_the_trunk(digits: Study) -> None:
    problem = problem_of(digits)
    run = runs_of(digits.methods[0])[0]
    [(record, params)] = train_runs(digits, problem, [run], ignore)
    trunk = {name: leaf.requires_grad_() for name, leaf in params["trunk"].items()}
    x, y = TrainingTasks(digits, problem, run.seed)(0)["support"]
    rows = []
    for task in range(6):
        loss = functional.cross_entropy(outputs(trunk, params["heads"], task, x[task]), y[task])
        rows.append(flat(torch.autograd.grad(loss, list(trunk.values()))))
    cosines = [[torch.cosine_similarity(a, b, dim=0).item() for b in rows] for a in rows]
    assert record.agreement is not None
    torch.testing.assert_close(torch.tensor(record.agreement), torch.tensor(cosines))


def test_the_trunk_is_shared_and_the_heads_begin_apart(digits: Study) -> None:
    params, module = initial_params(digits, 3), build_module(digits)
    assert set(params["trunk"]) | set(params["heads"]) == dict(module.named_parameters()).keys()
    assert set(params["heads"]) == {"5.weight", "5.bias"}
    assert params["heads"]["5.weight"].shape == (6, 10, 5)
    assert len(torch.unique(params["heads"]["5.bias"], dim=0)) == 6
    other = initial_params(digits, 4)
    assert not torch.equal(other["trunk"]["1.weight"], params["trunk"]["1.weight"])


def test_a_marker_in_test_drawings_is_seen_by_the_test_alone(
    digits: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = build_problem(digits, None)
    whole = DigitPairs.__init__

    def marked(self: DigitPairs, drawings: Tensor, numbers: Tensor, splits: Tensor, /, **o: Any):
        drawings = torch.where((splits == 2)[:, None, None], 1 - drawings, drawings)
        whole(self, drawings, numbers, splits, **o)

    monkeypatch.setattr(DigitPairs, "__init__", marked)
    record, found = trained_alike(digits, clean, build_problem(digits, None))
    assert found.test != record.test


def test_with_batch_norm_the_study_trains(write_digits: WriteStudy) -> None:
    study = load(
        str(write_digits(model={"kind": "mlp", "hidden": [6], "batch_norm": True}, iterations=60))
    )
    run = Run(method=study.methods[1], rate=0.5, seed=3)
    [(record, _)] = train_runs(study, build_problem(study, None), [run], ignore)
    assert record.curve[-1].loss < record.curve[0].loss
