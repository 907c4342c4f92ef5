"""Peaks of memory, each measured in a process of its own."""

import subprocess
import sys

import pytest

MEGABYTES = 2**20
PEAK = """
import gc, sys
import torch
import gradagree_opt as ga

def loss_fn(w, x):
    return torch.tanh(w * x).sum()

def status(entry):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])

def step(tasks):
    options = {"engine": sys.argv[1], "chunk_size": int(sys.argv[2]) or None}
    ga.aggregate_gradients(loss_fn, params, tasks, ga.GradientAgreement(), **options)

params, n = torch.ones(2**20), int(sys.argv[3])  # 4 MiB
step(torch.ones(2, 1))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(torch.ones(n, 1))
print(status("VmHWM") - before)
"""


def peak(engine: str, chunk_size: int, n: int) -> float:
    """MiB that a step over n tasks takes beyond one over two tasks."""
    command = [sys.executable, "-c", PEAK, engine, str(chunk_size), str(n)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout) / MEGABYTES


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which Linux has"),
]


@pytest.mark.parametrize(("engine", "chunk_size"), [("streamed", 0), ("matrix_free", 2)])
def test_memory_does_not_grow_with_the_number_of_tasks(engine, chunk_size):
    assert peak(engine, chunk_size, 128) < 200


def test_the_memory_of_a_stack_does():
    assert peak("stacked", 0, 128) > 512


OUT_OF_MEMORY = """
import resource, sys
import torch
import gradagree_opt as ga

def loss_fn(w, x):
    return torch.tanh(w * x).sum()

params, tasks = torch.ones(2**20), torch.ones(200, 1)  # a stack of 0.8 GB
ga.aggregate_gradients(loss_fn, params, tasks[:2], ga.Mean())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
try:
    result = ga.aggregate_gradients(loss_fn, params, tasks, ga.NormShare(), engine=sys.argv[1])
except RuntimeError as error:
    print(error)
else:
    expected = 1 - torch.tanh(torch.ones(())) ** 2
    assert torch.allclose(result.update, expected.expand(2**20), rtol=1e-5)
    print(result.engine)
"""


@pytest.mark.parametrize(
    ("engine", "said"),
    [("stacked", "; give chunk_size=14, or engine='streamed'"), ("auto", "streamed")],
)
def test_out_of_memory_falls_back_or_names_a_chunk_size(engine, said):
    run = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, engine], capture_output=True, text=True, check=True
    )
    message = run.stdout.strip()
    assert message.endswith(said), message
    if engine == "stacked":
        assert message.startswith("expected 200 tasks at once to fit into memory under engine='")
