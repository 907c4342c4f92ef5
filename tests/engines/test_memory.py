"""Peaks of memory, measured in processes of their own."""

import subprocess
import sys

import pytest

PEAK = """
import torch
import gradagree_opt as ga

def loss_fn(w, x):
    return torch.tanh(w * x).sum()

def status(entry):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])

params = torch.ones(2**18)  # 1 MiB

def step(n, **options):
    ga.aggregate_gradients(loss_fn, params, torch.ones(n, 1), ga.GradientAgreement(), **options)

# The largest comes last: what it frees could hold the others.
for options in ({"engine": "streamed"}, {"engine": "matrix_free", "chunk_size": 2},
                {"engine": "stacked"}):
    step(2, **options)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    step(128, **options)
    print((status("VmHWM") - before) / 2**20)
"""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which Linux has"),
]


def test_only_the_memory_of_a_stack_grows_with_the_number_of_tasks():
    """MiB that a step over 128 tasks of 1 MiB takes beyond one over two tasks."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    streamed, matrix_free, stacked = map(float, run.stdout.split())
    assert streamed < 50 and matrix_free < 50
    assert stacked > 128


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
