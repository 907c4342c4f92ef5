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
STEPS = """
def report():
    found = counters["inductor"]
    print(found["fxgraph_cache_miss"], found["fxgraph_cache_hit"])
    counters.clear()

ga.MAML(loss_fn, inner, compile=True).step(params, tasks, ga.GradientAgreement())
report()

from gradagree_opt.ablation.training.grouping import OuterStep, StepInputs, stack
both, support = stack([params, params]), stack([{"support": batch}] * 2)
step = OuterStep(ga.Reptile(loss_fn, inner), "adam", True)
aggregator = ga.GradientAgreement(nonfinite="propagate")
rows = StepInputs(both, step.initial([params, params]), torch.ones(2), support, None)
step(aggregator, rows)
report()
"""


def misses_and_hits(cache: Path) -> list[tuple[int, int]]:
    """Of a step of MAML, and of one of a study."""
    # Of vector instructions, each new cache tries to compile every kind there is.
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "ATEN_CPU_CAPABILITY": "default"}
    process = subprocess.run(
        [sys.executable, "-c", SETUP + STEPS],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    maml, study = (tuple(map(int, line.split())) for line in process.stdout.splitlines())
    return [maml, study]


def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    first = misses_and_hits(tmp_path)
    assert all(misses >= 1 and hits == 0 for misses, hits in first)
    assert misses_and_hits(tmp_path) == [(0, misses) for misses, _ in first]
