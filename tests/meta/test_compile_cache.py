"""The second process takes what the first one compiled from torch's cache on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiled

SETUP = """
import torch
from torch._dynamo.utils import counters
import gradagree_opt as ga

def loss_fn(params, batch):
    x, y = batch
    return (torch.tanh(x @ params["w"]) @ params["v"] - y).square().mean()

params = {"w": torch.ones(1, 3), "v": torch.ones(3, 1)}
batch = torch.rand(2, 4, 1), torch.rand(2, 4, 1)
tasks, inner = {"support": batch, "query": batch}, ga.InnerSGD(0.1, 1)
"""
STEPS = {
    "MAML": "ga.MAML(loss_fn, inner, compile=True).step(params, tasks, ga.GradientAgreement())",
    "a study": """
from gradagree_opt.ablation.training.grouping import OuterStep, StepInputs, stack
both, support = stack([params, params]), stack([{"support": batch}] * 2)
step = OuterStep(ga.Reptile(loss_fn, inner), "adam", True)
aggregator = ga.GradientAgreement(nonfinite="propagate")
rows = StepInputs(both, step.initial([params, params]), torch.ones(2), support, None)
step(aggregator, rows)
""",
}
REPORT = """
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


def misses_and_hits(step: str, cache: Path) -> tuple[int, int]:
    process = subprocess.run(
        [sys.executable, "-c", SETUP + step + REPORT],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    misses, hits = map(int, process.stdout.split())
    return misses, hits


@pytest.mark.parametrize("name", STEPS)
def test_the_second_process_compiles_nothing(name: str, tmp_path: Path) -> None:
    misses, hits = misses_and_hits(STEPS[name], tmp_path)
    assert misses >= 1 and hits == 0
    assert misses_and_hits(STEPS[name], tmp_path) == (0, misses)
