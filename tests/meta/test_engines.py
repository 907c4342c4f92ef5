"""Every engine, weighting and meta-algorithm against loops over one task after the other."""

import pytest
import torch
from torch.utils._pytree import tree_map

import gradagree_opt as ga
from gradagree_opt.engines import candidates
from gradagree_testing.looping import every

from .loops import ALGORITHMS
from .problems import assert_same, loss_fn, problem
from .rules import EQUAL, GROUPED_RULES, PAPER, RULES, flat

CASE = problem(n=5)
ENGINES = ("stacked", "streamed", "one_backward", "matrix_free")
WITH_ENGINES = {name: a for name, a in ALGORITHMS.items() if name != "Reptile"}
MATRIX_FREE_RULES = ("mean", "sum", "agreement", "propagate", "clip", "softmax", "shorter")
each_engine = pytest.mark.parametrize("engine", ENGINES)
ALL_RULES = RULES | GROUPED_RULES
STACK_RULES = ("second power", "norm clipped", "geometric median")
STACK_RULES += tuple(name for name in ALL_RULES if "equal" in name)
"""Those that read all products, or the median norm, of the signals."""
each_algorithm = pytest.mark.parametrize("algorithm", WITH_ENGINES.values(), ids=WITH_ENGINES)


def serves(engine, algorithm, rule):
    """What the documentation says of the engines."""
    of_gradients, drops = algorithm.signal == "gradient", "drop" in rule
    return {
        "stacked": True,
        "streamed": rule not in STACK_RULES if of_gradients else not drops,
        "one_backward": not (of_gradients or drops),
        "matrix_free": of_gradients and rule in MATRIX_FREE_RULES,
    }[engine]


def step(algorithm, aggregator, **options):
    meta = algorithm.build(loss_fn, 0.1, 2, **options)
    return meta.step(CASE.meta(algorithm.learns_rates), CASE.tasks, aggregator)


def assert_equals_loop(result, algorithm, rule):
    params = CASE.meta(algorithm.learns_rates)
    signals, directions, losses = algorithm.tasks(loss_fn, params, CASE.each(), 0.1, 2)
    assert_same(result.update, rule.combine(signals, directions), tolerance=1e-12)
    torch.testing.assert_close(result.losses, torch.stack(losses), rtol=1e-12, atol=0)


def takes(algorithm, name):
    """Whether it is a rule for the algorithm."""
    return algorithm.takes_groups or name not in GROUPED_RULES


@each_engine
@each_algorithm
@every(name=list(ALL_RULES))
def test_step_equals_the_loop_over_tasks_or_is_refused(engine, algorithm, name):
    if not takes(algorithm, name):
        return
    rule = ALL_RULES[name]
    if serves(engine, algorithm, name):
        result = step(algorithm, rule.aggregator, engine=engine)
        assert result.engine == engine
        assert_equals_loop(result, algorithm, rule)
    else:
        with pytest.raises(ValueError, match=rf"that engine='{engine}' can serve, found"):
            step(algorithm, rule.aggregator, engine=engine)


@each_engine
@each_algorithm
@every(chunk_size=[1, 2, 7])
def test_chunks_do_not_change_the_step(engine, algorithm, chunk_size):
    if serves(engine, algorithm, "agreement"):
        result = step(algorithm, PAPER.aggregator, engine=engine, chunk_size=chunk_size)
        assert_equals_loop(result, algorithm, PAPER)


@each_algorithm
@every(name=list(ALL_RULES))
def test_auto_takes_an_engine_that_serves_the_aggregator(algorithm, name):
    if not takes(algorithm, name):
        return
    rule = ALL_RULES[name]
    result = step(algorithm, rule.aggregator)
    one_backward = serves("one_backward", algorithm, name) and rule.aggregator.scope == "global"
    assert result.engine == ("one_backward" if one_backward else "stacked")
    assert_equals_loop(result, algorithm, rule)


@each_engine
@each_algorithm
def test_every_engine_draws_the_same_random_weights(engine, algorithm):
    if serves(engine, algorithm, "mean"):
        expected, found = (
            step(algorithm, ga.RandomWeights(torch.Generator().manual_seed(3)), engine=name)
            for name in ("stacked", engine)
        )
        torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0)
        assert_same(found.update, flat(expected.update), tolerance=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 7])
@pytest.mark.parametrize("name", ["agreement", "cosine", "equal"])
def test_chunks_do_not_change_reptile(chunk_size, name):
    algorithm, rule = ALGORITHMS["Reptile"], RULES[name]
    result = step(algorithm, rule.aggregator, chunk_size=chunk_size)
    assert_equals_loop(result, algorithm, rule)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("rule", [PAPER, EQUAL], ids=["agreement", "equal"])
def test_steps_of_several_problems_at_once_equal_the_loops_over_their_tasks(name, rule):
    algorithm, cases = ALGORITHMS[name], [problem(seed=seed) for seed in range(3)]
    meta = algorithm.build(loss_fn, 0.1, 2)
    starts = [case.meta(algorithm.learns_rates) for case in cases]
    inputs = [(start, case.tasks) for start, case in zip(starts, cases, strict=True)]

    def update(params, tasks):
        return meta.aggregate_unchecked(params, tasks, rule.aggregator).update

    found = torch.vmap(update)(*tree_map(lambda *leaves: torch.stack(leaves), *inputs))
    for index, (start, case) in enumerate(zip(starts, cases, strict=True)):
        signals, directions, _ = algorithm.tasks(loss_fn, start, case.each(), 0.1, 2)
        one = tree_map(lambda leaf, i=index: leaf[i], found)
        assert_same(one, rule.combine(signals, directions), tolerance=1e-12)


def test_auto_holds_the_stack_in_maml_whose_tasks_have_parameters_of_their_own(monkeypatch):
    monkeypatch.setattr(candidates, "STACK_BYTES", 0)
    result = step(ALGORITHMS["MAML on gradients"], PAPER.aggregator)
    assert result.engine == "stacked"
