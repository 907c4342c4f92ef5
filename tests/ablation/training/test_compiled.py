"""Studies compiled: the same numbers, one program for a method, and none made twice."""

import pytest
import torch
from torch._dynamo.utils import counters

from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.sections import MAMLForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import Params
from gradagree_opt.ablation.training.problem import Problem, build_problem
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import run_settings, train_runs
from gradagree_opt.engines.compilation import maybe_compiled

pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()
    counters.clear()


def train(study: Study, problem: Problem, runs: list[Run]) -> list[Params]:
    return [params for _, params in train_runs(study, problem, runs, lambda _: None)]


def runs_of(method: Method, *labels: tuple[float, int]) -> list[Run]:
    return [Run(method=method, rate=rate, seed=seed) for rate, seed in labels]


def assert_compiled_is_eager(study: Study, runs: list[Run]) -> None:
    compiled = study.model_copy(update={"compile": True})
    found = train(compiled, build_problem(compiled, None), runs)
    eager = study.model_copy(update={"compile": False})
    expected = train(eager, build_problem(eager, None), runs)
    assert counters["stats"]["unique_graphs"] == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_compiled_group_is_the_eager_one(study: Study) -> None:
    assert_compiled_is_eager(study, runs_of(study.methods[1], (0.5, 3), (0.25, 3), (0.5, 5)))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_so_is_a_captured_one_of_maml_with_adam(
    study: Study, index: int, without_code_generation: None
) -> None:
    outer = study.outer.model_copy(update={"optimizer": "adam"})
    study = study.model_copy(update={"form": MAMLForm(kind="maml"), "outer": outer})
    assert_compiled_is_eager(study, runs_of(study.methods[index], (0.01, 3), (0.002, 5)))


@pytest.mark.parametrize("index", [0, 1, 3])
def test_so_is_a_captured_one_of_multi_task_training(
    digits: Study, index: int, without_code_generation: None
) -> None:
    assert_compiled_is_eager(digits, runs_of(digits.methods[index], (0.5, 3), (1.0, 5)))


def test_as_many_programs_are_kept_as_methods_want(
    study: Study, without_code_generation: None
) -> None:
    """More than torch keeps of one function (8; here 2) and of all of one code (256; here 4)."""
    doubled = maybe_compiled(lambda x: 2 * x, True)
    compiled = study.model_copy(update={"compile": True})
    limits = {"cache_size_limit": 2, "accumulated_cache_size_limit": 4}
    with torch._dynamo.config.patch(limits), run_settings(compiled, 0):
        for size in range(2, 10):
            assert len(doubled(torch.ones(size))) == size
    assert counters["stats"]["unique_graphs"] == 8


def test_a_program_serves_all_groups_of_its_method_and_size(
    study: Study, without_code_generation: None
) -> None:
    study = study.model_copy(update={"compile": True})
    problem = build_problem(study, None)
    graphs = []
    for index, labels in (
        (2, [(0.5, 3), (0.25, 5)]),
        (2, [(0.125, 7), (1.0, 9)]),
        (1, [(0.5, 3), (0.25, 5)]),
        (2, [(0.5, 1), (0.25, 1)]),
        (2, [(0.5, 1)]),
    ):
        train(study, problem, runs_of(study.methods[index], *labels))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 2, 2, 3]
