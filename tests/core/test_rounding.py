"""What processes compare before each of them decides by itself."""

import subprocess
import sys

import pytest
import torch

SETTINGS = [
    "torch.set_num_threads(torch.get_num_threads() + 1)",
    "torch.set_default_dtype(torch.float64)",
    "torch.set_float32_matmul_precision('high')",
]
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9, which then refuses the other
    SETTINGS.append("torch.backends.cuda.matmul.fp32_precision = 'ieee'")


def words_after(*settings: str) -> list[str]:
    """What a new process says at first, and after each setting."""
    say = "print(repr(rounding_of(torch.device('cpu'))))"
    lines = [line for setting in ("pass", *settings) for line in (setting, say)]
    script = "; ".join(["from gradagree_opt.core.rounding import *", *lines])
    return subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()


@pytest.mark.slow
def test_processes_say_the_same_until_a_setting_of_one_differs() -> None:
    one, *others = words_after(*SETTINGS)
    assert words_after() == [one]
    assert len({one, *others}) == 1 + len(SETTINGS)
