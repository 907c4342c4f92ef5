"""Every meta-algorithm with every weighting against loops over one task after the other."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga
from gradagree_testing import reference
from gradagree_testing.looping import every

from .loops import ALGORITHMS, build_maml, build_meta_sgd
from .problems import assert_same, distance, loss_fn, problem
from .rules import GROUPED_RULES, MEAN, PAPER, RULES, gram, length

LR = 0.1
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
WITH_GROUPS = {name: a for name, a in ALGORITHMS.items() if a.takes_groups}


def assert_equals_loop(algorithm, rule, case, *, tolerance, steps=2):
    params = case.meta(algorithm.learns_rates)
    meta = algorithm.build(loss_fn, LR, steps)
    result = meta.step(params, case.tasks, rule.aggregator)
    signals, directions, losses = algorithm.tasks(loss_fn, params, case.each(), LR, steps)
    assert_same(result.update, rule.combine(signals, directions), tolerance=tolerance)
    torch.testing.assert_close(result.losses, torch.stack(losses), rtol=tolerance, atol=0)


@each_algorithm
@every(rule=RULES, dtype=list(TOLERANCES))
def test_step_equals_the_loop_over_tasks(algorithm, rule, dtype):
    assert_equals_loop(algorithm, rule, problem(dtype=dtype), tolerance=TOLERANCES[dtype])


OWN_VECTORS = {"norm clipped", "geometric median", *(name for name in RULES if "equal" in name)}
"""The rules whose weights are made for the vectors that they combine."""


@pytest.mark.parametrize("algorithm", ["MAML", "Meta-SGD"])
@every(name=[*RULES])
def test_without_a_signal_each_rule_gets_the_one_that_it_is_made_for(algorithm, name):
    build = {"MAML": build_maml, "Meta-SGD": build_meta_sgd}[algorithm]
    one_task = ALGORITHMS[f"{algorithm} on gradients" if name in OWN_VECTORS else algorithm]
    as_built = replace(one_task, build=build)
    assert_equals_loop(as_built, RULES[name], problem(), tolerance=1e-12)


@pytest.mark.parametrize(("power", "signal"), [(-0.5, "gradient"), (0.5, "displacement")])
def test_negative_powers_of_the_gram_matrix_are_made_for_their_own_vectors(power, signal):
    case, aggregator = problem(), ga.GramianPower(power)
    found, expected = (
        build_maml(loss_fn, LR, 2, signal=each).step(case.params, case.tasks, aggregator)
        for each in (None, signal)
    )
    assert_same(found.update, expected.update, tolerance=0)
    assert found.engine == {"gradient": "stacked", "displacement": "one_backward"}[signal]


@pytest.mark.parametrize("algorithm", WITH_GROUPS.values(), ids=WITH_GROUPS)
@every(rule=GROUPED_RULES, dtype=list(TOLERANCES))
def test_step_with_grouped_weights_equals_the_loop_over_tasks(algorithm, rule, dtype):
    assert_equals_loop(algorithm, rule, problem(dtype=dtype), tolerance=TOLERANCES[dtype])


@each_algorithm
@pytest.mark.parametrize("rule", [MEAN, PAPER], ids=["mean", "agreement"])
@settings(max_examples=10)
@given(
    n=st.integers(1, 5),
    shots=st.integers(1, 4),
    steps=st.integers(0, 3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 10_000),
)
def test_step_equals_the_loop_on_random_problems(algorithm, rule, n, shots, steps, sizes, seed):
    inputs, hidden, outputs = sizes
    case = problem(n, seed=seed, shots=shots, inputs=inputs, hidden=hidden, outputs=outputs)
    params = case.meta(algorithm.learns_rates)
    meta = algorithm.build(loss_fn, LR, steps)
    result = meta.step(params, case.tasks, rule.aggregator)
    signals, directions, _ = algorithm.tasks(loss_fn, params, case.each(), LR, steps)
    # Scores that nearly cancel magnify the rounding of the signals.
    products = gram(signals)
    scores = abs(reference.scores(products)).sum()
    magnified = 1 + n * products.trace() / scores if scores else 1
    terms = sum(length(direction) for direction in directions)
    expected = rule.combine(signals, directions)
    assert distance(result.update, expected) <= 1e-13 * magnified * terms


@each_algorithm
def test_weights_and_scores_are_those_of_the_signals(algorithm):
    case = problem(n=5)
    params = case.meta(algorithm.learns_rates)
    result = algorithm.build(loss_fn, LR, 2).step(params, case.tasks, ga.GradientAgreement())
    signals, _, _ = algorithm.tasks(loss_fn, params, case.each(), LR, 2)
    products = gram(signals)
    assert result.weights.numpy() == pytest.approx(reference.agreement(products), rel=1e-12)
    assert result.scores.numpy() == pytest.approx(reference.scores(products), rel=1e-12)


@each_algorithm
def test_losses_are_those_on_the_query_set_after_adaptation(algorithm):
    case = problem()
    params = case.meta(algorithm.learns_rates)
    meta = algorithm.build(loss_fn, LR, 3)
    result = meta.step(params, case.tasks, ga.Mean())
    for loss, task in zip(result.losses, case.each(), strict=True):
        adapted = meta.adapt(params, task["support"])
        assert loss.item() == pytest.approx(loss_fn(adapted, task["query"]).item(), rel=1e-12)
        assert loss.item() != pytest.approx(loss_fn(adapted, task["support"]).item(), rel=1e-3)


@each_algorithm
def test_without_inner_steps_displacements_say_nothing_and_the_weights_are_uniform(algorithm):
    case = problem()
    params = case.meta(algorithm.learns_rates)
    result = algorithm.build(loss_fn, LR, 0).step(params, case.tasks, ga.GradientAgreement())
    _, directions, _ = algorithm.tasks(loss_fn, params, case.each(), LR, 0)
    degenerate = algorithm.signal == "displacement"
    assert result.diagnostics.degenerate == degenerate
    expected = (MEAN if degenerate else PAPER).combine(directions, directions)
    assert_same(result.update, expected, tolerance=1e-12)


@each_algorithm
def test_step_changes_neither_parameters_nor_tasks_nor_grad(algorithm):
    case = problem()
    params = tree_map(lambda p: p.requires_grad_(), case.meta(algorithm.learns_rates))
    before = tree_map(lambda leaf: leaf.detach().clone(), (params, case.tasks))
    algorithm.build(loss_fn, LR, 2).step(params, case.tasks, ga.GradientAgreement())
    after = tree_leaves((params, case.tasks))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before), after, strict=True))
    assert all(p.grad is None and p.requires_grad for p in tree_leaves(params))


@each_algorithm
@pytest.mark.parametrize(
    "aggregator",
    [ga.GradientAgreement(), ga.GradientAgreement(match_norm="mean"), ga.Mean()],
    ids=["agreement", "shorter", "mean"],
)
def test_what_is_kept_to_be_logged_holds_no_graph(algorithm, aggregator):
    case = problem()
    params = tree_map(lambda p: p.requires_grad_(), case.meta(algorithm.learns_rates))
    result = algorithm.build(loss_fn, LR, 2).step(params, case.tasks, aggregator)
    kept = tree_leaves((result.losses, result.weights, result.scores, result.diagnostics))
    assert not any(leaf.requires_grad for leaf in kept)


@pytest.mark.parametrize("kind", [ga.MAML, ga.Reptile])
def test_the_update_holds_no_graph_of_inner_rates_that_are_trained(kind):
    case = problem()
    rates = tree_map(lambda rate: rate.clone().requires_grad_(), case.rates)
    meta = kind(loss_fn, ga.InnerSGD(rates, 2))
    result = meta.step(case.params, case.tasks, ga.GradientAgreement())
    assert not any(leaf.requires_grad for leaf in tree_leaves(result.update))


@each_algorithm
def test_random_weights_of_equal_seeds_are_equal_and_those_of_the_next_step_are_not(algorithm):
    case = problem()
    params = case.meta(algorithm.learns_rates)
    meta = algorithm.build(loss_fn, LR, 1)
    aggregators = [ga.RandomWeights(torch.Generator().manual_seed(7)) for _ in range(2)]
    first, again = (meta.step(params, case.tasks, aggregator) for aggregator in aggregators)
    later = meta.step(params, case.tasks, aggregators[0])
    assert torch.equal(first.weights, again.weights)
    assert not torch.allclose(first.weights, later.weights)
    _, directions, _ = algorithm.tasks(loss_fn, params, case.each(), LR, 1)
    expected = {
        name: sum(w * d[name] for w, d in zip(first.weights.tolist(), directions, strict=True))
        for name in directions[0]
    }
    assert_same(first.update, expected, tolerance=1e-7)


@each_algorithm
def test_parameters_may_be_any_pytree(algorithm):
    case = problem()
    named = case.meta(algorithm.learns_rates)
    names = list(case.params)

    def as_tuple(params):
        return tuple(params[name] for name in names)

    def on_tuple(params, batch):
        return loss_fn(dict(zip(names, params, strict=True)), batch)

    params = (
        {part: as_tuple(leaves) for part, leaves in named.items()}
        if algorithm.learns_rates
        else as_tuple(named)
    )
    expected = algorithm.build(loss_fn, LR, 2).step(named, case.tasks, ga.GradientAgreement())
    result = algorithm.build(on_tuple, LR, 2).step(params, case.tasks, ga.GradientAgreement())
    pairs = zip(tree_leaves(result.update), tree_leaves(expected.update), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert isinstance(result.update["params"] if algorithm.learns_rates else result.update, tuple)


@each_algorithm
def test_parameters_that_no_loss_uses_get_a_zero_update(algorithm):
    case = problem()
    unused = torch.ones(2, dtype=torch.float64)
    case = case._replace(
        params=case.params | {"unused": unused}, rates=case.rates | {"unused": unused}
    )
    params = case.meta(algorithm.learns_rates)
    result = algorithm.build(loss_fn, LR, 2).step(params, case.tasks, ga.GradientAgreement())
    update = result.update["params"] if algorithm.learns_rates else result.update
    assert torch.equal(update["unused"], torch.zeros_like(unused))
