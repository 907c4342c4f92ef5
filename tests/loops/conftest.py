"""A small model, a task of it, and calls that are refused."""

import pytest
import torch
from torch import nn


@pytest.fixture
def model():
    return nn.Linear(3, 2, dtype=torch.float64)


def named(model):
    return dict(model.named_parameters())


def loss_of(params, target=1.0):
    return sum(((p - target) ** 2).sum() for p in params.values())


def adapted_from(model, target=1.0):
    return {name: p - 0.1 * (p - target) for name, p in named(model).items()}


def refuses(call, message, *, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
