"""The outer optimizers as functions against torch.optim."""

from functools import partial
from typing import get_args

import pytest
import torch

from gradagree_opt.ablation.section import Optimizer
from gradagree_opt.ablation.training.optimizers import OPTIMIZERS

KINDS = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
}


def test_every_optimizer_that_a_study_may_name_is_there() -> None:
    assert set(OPTIMIZERS) == set(get_args(Optimizer))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_step_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    """Gradients from 1e-12, below Adam's epsilon, to 1e6, with zeros among them."""
    torch.manual_seed(0)
    shapes = {"w": (4, 3), "b": (3,), "scale": ()}
    params = {key: torch.randn(shape, dtype=dtype) for key, shape in shapes.items()}
    theirs = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    optimizer = KINDS[name](list(theirs.values()), lr=1.0)
    state = OPTIMIZERS[name].initial(params)
    for step in range(60):
        rate = 0.1 / (1 + step)
        size = 10.0 ** (-12 + 0.3 * step)  # Adam remembers the larger of earlier ones
        update = {key: size * torch.randn(shape, dtype=dtype) for key, shape in shapes.items()}
        update["b"][step % 3] = 0
        params, state = OPTIMIZERS[name].step(params, update, state, torch.tensor(rate))
        optimizer.param_groups[0]["lr"] = rate
        for key, leaf in theirs.items():
            leaf.grad = update[key].clone()
        optimizer.step()
        for key, leaf in params.items():
            torch.testing.assert_close(leaf, theirs[key].detach(), rtol=2e-6, atol=1e-7)
