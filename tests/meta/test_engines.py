"""Every engine, weighting and meta-algorithm against loops over one task after the other."""

import pytest
import torch

import gradagree_opt as ga
from gradagree_opt.engines import runner

from .loops import ALGORITHMS
from .problems import assert_same, loss_fn, problem
from .rules import GROUPED_RULES, PAPER, RULES, flat

CASE = problem(n=5)
ENGINES = ("stacked", "streamed", "one_backward", "matrix_free")
WITH_ENGINES = {name: a for name, a in ALGORITHMS.items() if name != "Reptile"}
MATRIX_FREE_RULES = ("mean", "sum", "agreement", "propagate", "clip", "softmax", "shorter")
each_engine = pytest.mark.parametrize("engine", ENGINES)
ALL_RULES = RULES | GROUPED_RULES
PAIRS = {
    f"{name}, {rule}": (algorithm, rule)
    for name, algorithm in WITH_ENGINES.items()
    for rule in (RULES if algorithm.learns_rates else ALL_RULES)
}
each_algorithm = pytest.mark.parametrize("algorithm", WITH_ENGINES.values(), ids=WITH_ENGINES)
each_pair = pytest.mark.parametrize(("algorithm", "name"), PAIRS.values(), ids=PAIRS)


def serves(engine, algorithm, rule):
    """What the documentation says of the engines."""
    drops = "drop" in rule
    return {
        "stacked": True,
        "streamed": algorithm.signal == "gradient" or not drops,
        "one_backward": algorithm.signal == "displacement" and not drops,
        "matrix_free": algorithm.signal == "gradient" and rule in MATRIX_FREE_RULES,
    }[engine]


def step(algorithm, aggregator, **options):
    meta = algorithm.build(loss_fn, 0.1, 2, **options)
    return meta.step(CASE.meta(algorithm.learns_rates), CASE.tasks, aggregator)


def assert_equals_loop(result, algorithm, rule):
    params = CASE.meta(algorithm.learns_rates)
    signals, directions, losses = algorithm.tasks(loss_fn, params, CASE.each(), 0.1, 2)
    assert_same(result.update, rule.combine(signals, directions), tolerance=1e-12)
    torch.testing.assert_close(result.losses, torch.stack(losses), rtol=1e-12, atol=0)


@each_engine
@each_pair
def test_step_equals_the_loop_over_tasks_or_is_refused(engine, algorithm, name):
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
@pytest.mark.parametrize("chunk_size", [1, 2, 7])
def test_chunks_do_not_change_the_step(engine, algorithm, chunk_size):
    if serves(engine, algorithm, "agreement"):
        result = step(algorithm, PAPER.aggregator, engine=engine, chunk_size=chunk_size)
        assert_equals_loop(result, algorithm, PAPER)


@each_pair
def test_auto_takes_an_engine_that_serves_the_aggregator(algorithm, name):
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
@pytest.mark.parametrize("rule", [RULES["agreement"], RULES["cosine"]], ids=["agreement", "cosine"])
def test_chunks_do_not_change_reptile(chunk_size, rule):
    algorithm = ALGORITHMS["Reptile"]
    result = step(algorithm, rule.aggregator, chunk_size=chunk_size)
    assert_equals_loop(result, algorithm, rule)


def test_auto_holds_the_stack_in_maml_whose_tasks_have_parameters_of_their_own(monkeypatch):
    monkeypatch.setattr(runner, "STACK_BYTES", 0)
    result = step(ALGORITHMS["MAML on gradients"], PAPER.aggregator)
    assert result.engine == "stacked"
