"""A task whose inner loop diverges, or whose query loss is not finite."""

from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga
from gradagree_testing.looping import every

from .loops import ALGORITHMS
from .problems import Problem, assert_same, loss_fn, problem
from .rules import flat

CASE = problem(n=4)
DIVERGENT = 1
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
AGGREGATORS = {
    "mean": ga.Mean,
    "sum": ga.Sum,
    "norm share": ga.NormShare,
    "agreement": ga.GradientAgreement,
    "cosine": partial(ga.GradientAgreement, similarity="cosine"),
    "shorter": partial(ga.GradientAgreement, match_norm="mean"),
    "softmax": partial(ga.GradientAgreement, normalization="softmax"),
    "equal": ga.EqualAgreement,
}


def with_targets(case: Problem, part: str, target: float) -> dict:
    """The tasks, with huge targets for one of them in its support or query set."""
    tasks = tree_map(torch.clone, case.tasks)
    tasks[part][1][DIVERGENT] = target
    return tasks


def build(algorithm):
    return algorithm.build(loss_fn, 0.1, 3)


@each_algorithm
@every(aggregator=AGGREGATORS, target=[1e150, float("inf"), float("nan")])
def test_drop_gives_the_step_over_the_other_tasks(algorithm, aggregator, target):
    params = CASE.meta(algorithm.learns_rates)
    tasks = with_targets(CASE, "support", target)
    result = build(algorithm).step(params, tasks, aggregator(nonfinite="drop"))
    others = build(algorithm).step(params, CASE.without(DIVERGENT), aggregator())
    assert_same(result.update, flat(others.update), tolerance=1e-12)
    kept = [i for i in range(4) if i != DIVERGENT]
    assert result.weights[DIVERGENT] == 0
    torch.testing.assert_close(result.weights[kept], others.weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.losses[kept], others.losses, rtol=1e-12, atol=0)
    assert result.diagnostics.nonfinite.tolist() == [i == DIVERGENT for i in range(4)]
    others_logged = others.diagnostics.log()
    logged = result.diagnostics.log() | {"nonfinite_tasks": 0.0}
    for name in ("weight_sum", "effective_tasks", "cancellation", "update_norm"):
        assert logged[name] == pytest.approx(others_logged[name], rel=1e-6), name


@each_algorithm
@pytest.mark.parametrize("target", [1e150, float("nan")])
def test_raise_names_the_task_and_leaves_the_parameters(algorithm, target):
    params = CASE.meta(algorithm.learns_rates)
    before = tree_map(torch.clone, params)
    tasks = with_targets(CASE, "support", target)
    with pytest.raises(ValueError, match=rf"found NaN or inf in tasks \[{DIVERGENT}\]"):
        build(algorithm).step(params, tasks, ga.GradientAgreement())
    pairs = zip(tree_leaves(before), tree_leaves(params), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@each_algorithm
def test_propagate_hands_the_nan_on_without_a_look(algorithm):
    params = CASE.meta(algorithm.learns_rates)
    tasks = with_targets(CASE, "support", float("nan"))
    result = build(algorithm).step(params, tasks, ga.GradientAgreement(nonfinite="propagate"))
    assert any(leaf.isnan().any() for leaf in tree_leaves(result.update))
    assert result.diagnostics.nonfinite.tolist() == [i == DIVERGENT for i in range(4)]


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "Reptile"])
@pytest.mark.parametrize("target", [float("nan"), 1e200], ids=["nan", "loss alone infinite"])
def test_drop_leaves_out_what_raise_names_for_its_query_set(name, target):
    algorithm = ALGORITHMS[name]
    params = CASE.meta(algorithm.learns_rates)
    tasks = with_targets(CASE, "query", target)
    with pytest.raises(ValueError, match=rf"found NaN or inf in tasks \[{DIVERGENT}\]"):
        build(algorithm).step(params, tasks, ga.GradientAgreement())
    result = build(algorithm).step(params, tasks, ga.GradientAgreement(nonfinite="drop"))
    others = build(algorithm).step(params, CASE.without(DIVERGENT), ga.GradientAgreement())
    assert_same(result.update, flat(others.update), tolerance=1e-12)


def test_reptile_learns_from_a_task_whose_query_loss_is_nan():
    tasks = with_targets(CASE, "query", float("nan"))
    reptile = build(ALGORITHMS["Reptile"])
    result = reptile.step(CASE.params, tasks, ga.GradientAgreement())
    expected = reptile.step(CASE.params, CASE.tasks, ga.GradientAgreement())
    assert_same(result.update, expected.update, tolerance=0)
    assert result.losses.isnan().tolist() == [i == DIVERGENT for i in range(4)]


@each_algorithm
def test_when_every_task_is_dropped_the_update_is_zero(algorithm):
    params = CASE.meta(algorithm.learns_rates)
    tasks = tree_map(lambda leaf: torch.full_like(leaf, float("nan")), CASE.tasks)
    result = build(algorithm).step(params, tasks, ga.GradientAgreement(nonfinite="drop"))
    assert all(leaf.eq(0).all() for leaf in tree_leaves(result.update))
    assert result.weights.eq(0).all()
