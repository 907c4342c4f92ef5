"""What docs/scaling.md says that one loses by agreement within each rank, and by coarser sums."""

import re
from math import log2
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import mse_loss

import gradagree_opt as ga
from gradagree_opt.tasks import Sine

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
BATCHES, TASKS = 40, 16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Displacements ``[16, d]`` of forty batches of sines, by five inner steps of a new network."""
    torch.manual_seed(0)
    layers = (nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    model = nn.Sequential(*layers)
    params = {name: p.detach().double() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(functional_call(model, params, (batch[0],)), batch[1])

    def displacement(support: tuple[Tensor, Tensor]) -> Tensor:
        adapted = ga.Reptile(loss, ga.InnerSGD(0.02, 5)).adapt(params, support)
        return torch.cat([(p - adapted[name]).flatten() for name, p in params.items()])

    sine = Sine(support_shots=10, query_shots=1, dtype=torch.float64)
    draws = [torch.Generator().manual_seed(seed) for seed in range(BATCHES)]
    supports = [sine.sample(TASKS, generator=each)["support"] for each in draws]
    return [vmap(displacement)(support).detach() for support in supports]


def share_back(exact: Tensor, inexact: Tensor, mean: Tensor) -> float:
    """How far an update has gone from the exact one to the mean."""
    way = mean - exact
    return float((inexact - exact) @ way / (way @ way))


def told(row: str) -> list[float]:
    """The numbers in the last such row of the page's tables."""
    *_, line = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(row)]
    return [float(number) for number in re.findall(r"[\d.]+", line.split("|", 2)[2])]


@pytest.mark.parametrize("one", [ga.GradientAgreement(), ga.EqualAgreement()], ids=str)
def test_agreement_within_a_rank_goes_back_to_the_mean(
    one: ga.Aggregator, batches: list[Tensor]
) -> None:
    found = []
    for size in (8, 4, 2, 1):
        shares = []
        for stack in batches:
            within = torch.stack([one(part) for part in stack.split(size)]).mean(0)
            shares.append(share_back(one(stack), within, stack.mean(0)))
        found.append(sum(shares) / len(shares))
    assert found == pytest.approx(told(f"| `{type(one).__name__}` |"), abs=0.02)


def test_a_step_on_more_ranks_takes_as_long_as_the_formula_says() -> None:
    latency, bandwidth, d = 10e-6, 12.5e9, 25e6
    for ranks in (2, 8, 64, 1024, 10000):
        n, steps = 4 * ranks, 2 * log2(ranks) * latency
        share = 2 * (ranks - 1) / ranks / bandwidth
        vector = steps + share * 4 * d
        short = 2 * steps + share * (8 * (9 * ranks + 5 * n) + 4 * 3 * ranks)
        milliseconds = [1000 * time for time in (vector, 2 * vector + short, short)]
        assert milliseconds == pytest.approx(told(f"| {ranks} |"), abs=0.051)


def test_sums_in_bfloat16_and_projections_change_the_update(batches: list[Tensor]) -> None:
    bfloat16, projected = [], []
    for seed, stack in enumerate(batches):
        exact, mean = ga.GradientAgreement()(stack), stack.mean(0)
        total = torch.zeros_like(mean, dtype=torch.bfloat16)
        for part in stack.split(4):
            total = total + part.sum(0).bfloat16()
        scores = stack @ total.double()
        bfloat16.append((scores / scores.abs().sum() @ stack - exact).norm() / exact.norm())
        draws = torch.Generator().manual_seed(seed)
        few = stack @ torch.randn(stack.shape[1], 1024, generator=draws, dtype=stack.dtype)
        scores = few @ few.sum(0)
        error = scores / scores.abs().sum() @ stack - exact
        projected.append(error.norm() / (exact - mean).norm())
    for errors, row in ((bfloat16, "| Σ_j g_j in bfloat16"), (projected, "| 1024 random")):
        percent = 100 * torch.stack(errors)
        found = [percent.median().item(), percent.amax().item()]
        assert found == pytest.approx(told(row), rel=0.1)
