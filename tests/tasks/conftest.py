"""Characters made for the tests, and the real Omniglot where it is at hand."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "omniglot28.npz"


@pytest.fixture(scope="session")
def seeded() -> Callable[[int], torch.Generator]:
    """A new generator with this seed."""
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def named_images() -> Tensor:
    """30 characters of 20 drawings: pixel (0, 0) is the character, pixel (0, 1) the drawing."""
    images = torch.zeros(30, 20, 28, 28, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(30, dtype=torch.uint8)[:, None]
    images[:, :, 0, 1] = torch.arange(20, dtype=torch.uint8)
    return images


@pytest.fixture(scope="session")
def omniglot_npz() -> Path:
    """The real archive, named by GRADAGREE_OMNIGLOT or beside the repository."""
    path = Path(os.environ.get("GRADAGREE_OMNIGLOT", REAL))
    if not path.is_file():
        pytest.skip(f"no Omniglot archive at {path}: name one in GRADAGREE_OMNIGLOT")
    return path
