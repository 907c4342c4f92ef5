"""What the tests of training share."""

from collections.abc import Iterator

import pytest
import torch

from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.problem import Problem, build_problem
from gradagree_opt.ablation.training.run import Run

EQUAL = Method(name="equal", aggregator="equal_agreement")
METHODS = {
    "mean": Method(name="mean", aggregator="mean"),
    "agreement with momentum": Method(name="ga", aggregator="gradient_agreement", outer="momentum"),
    "equal with Adam": EQUAL.model_copy(update={"outer": "adam"}),
    "random": Method(name="random", aggregator="random_weights"),
    "geometric median": Method(name="median", aggregator="geometric_median"),
    "length of equal": Method(
        name="length", aggregator="mean", options={"match_norm": {"aggregator": "equal_agreement"}}
    ),
}


def runs_of(method: Method, *labels: tuple[float, int]) -> list[Run]:
    return [Run(method=method, rate=rate, seed=seed) for rate, seed in labels]


@pytest.fixture
def float64() -> Iterator[None]:
    """In which two ways to compute one thing hardly part."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def problem(study: Study) -> Problem:
    return build_problem(study, None)
