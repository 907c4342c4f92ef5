"""torch.compile of whole aggregations, without a break in their graphs."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import gradagree_opt as ga
from gradagree_testing.configurations import CONFIGURATIONS, METHODS, Configuration

pytestmark = pytest.mark.compiled

SOME = (
    "cosine-False-clip-softmax",
    "mean-matched",
    "equal-inner",
    "power-2",
    "geometric-median",
)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def stack(n: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(n, 4, 3, generator=generator),
        "b": torch.randn(n, generator=generator),
    }


def assert_one_graph_gives_what_eager_execution_gives(configuration: Configuration) -> None:
    aggregator = configuration.make(nonfinite="propagate")
    compiled = torch.compile(aggregator.aggregate, fullgraph=True)
    for seed in range(2):
        expected = aggregator.aggregate(stack(seed=seed))
        assert_close(tuple(compiled(stack(seed=seed))), tuple(expected), equal_nan=True)


@pytest.mark.parametrize("configuration", METHODS, ids=str)
def test_generated_code_gives_what_eager_execution_gives(configuration: Configuration):
    assert_one_graph_gives_what_eager_execution_gives(configuration)


@pytest.mark.parametrize("configuration", [c for c in CONFIGURATIONS if c.name in SOME], ids=str)
def test_one_captured_graph_does_too(configuration: Configuration, without_code_generation: None):
    assert_one_graph_gives_what_eager_execution_gives(configuration)


@pytest.mark.parametrize("configuration", METHODS, ids=str)
def test_groups_and_a_signal_are_one_graph_too(
    configuration: Configuration, without_code_generation: None
):
    aggregator = configuration.make(scope="leaf", nonfinite="propagate")
    compiled = torch.compile(aggregator.aggregate, fullgraph=True)
    directions, signal = stack(), stack(seed=1)
    expected = aggregator.aggregate(directions, signal)
    assert_close(tuple(compiled(directions, signal)), tuple(expected), equal_nan=True)


@pytest.mark.parametrize(
    "aggregator", [ga.EqualAgreement(), ga.GramianPower(-0.5)], ids=["equal", "power"]
)
def test_problems_side_by_side_are_one_graph(
    aggregator: ga.Aggregator, without_code_generation: None
):
    """To the compiler the solver and the eigenvalues are operators, which vmap has to know."""
    compiled = torch.compile(torch.vmap(aggregator.aggregate_unchecked), fullgraph=True)
    problems = [stack(seed=seed) for seed in range(3)]
    result = compiled(tree_map(lambda *leaves: torch.stack(leaves), *problems))
    for index, problem in enumerate(problems):
        found = tree_map(lambda leaf, i=index: leaf[i], result)
        expected = aggregator.aggregate(problem)
        assert_close(tuple(found), tuple(expected), equal_nan=True)


@pytest.mark.parametrize("configuration", METHODS, ids=str)
def test_dropping_tasks_is_one_graph_too(
    configuration: Configuration, without_code_generation: None
):
    aggregator = configuration.make(nonfinite="drop")
    compiled = torch.compile(aggregator.aggregate, fullgraph=True)
    grads = stack()
    grads["b"][2] = torch.inf
    expected = aggregator.aggregate(grads)
    assert_close(tuple(compiled(grads)), tuple(expected), equal_nan=True)


def test_compiled_code_propagates_tasks_that_are_not_finite():
    aggregator = ga.GradientAgreement(nonfinite="propagate")
    grads = stack()
    grads["b"][2] = torch.nan
    update = torch.compile(aggregator.aggregate, fullgraph=True)(grads).update
    assert update["w"].isnan().all()
