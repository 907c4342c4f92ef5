"""A loss function's model is found, whatever way the function holds it."""

from functools import partial, wraps
from types import ModuleType

import pytest
import torch
from torch import nn

from gradagree_opt.engines.reached import reach

script = ModuleType("script")  # as one that is imported


def plain(params, batch, *, model=None):
    return model(batch).sum()


def by_global(params, batch):
    return script.model(batch).sum()


class Trainer:
    def __init__(self, model):
        self.models = [{"own": (model,)}]

    def loss(self, params, batch):
        return self.models[0]["own"][0](batch).sum()

    def __call__(self, params, batch):
        return script.trainer.loss(params, batch)


def of_global(model):
    script.model = model
    return by_global


def of_its_class(model):
    script.trainer = Trainer(model)
    return Trainer(None)


def wrapped(model):
    loss = partial(plain, model=model)

    @wraps(plain)
    def outer(*arguments):
        return loss(*arguments)

    return outer


WAYS = {
    "closure": lambda model: lambda params, batch: model(batch).sum(),
    "default": lambda model: lambda params, batch, model=model: model(batch).sum(),
    "keyword": lambda model: lambda params, batch, *, model=model: model(batch).sum(),
    "partial": lambda model: partial(plain, model=model),
    "wrapped": wrapped,
    "method": lambda model: Trainer(model).loss,
    "object": lambda model: Trainer(model),
    "global of another module": of_global,
    "global of the call of an object": of_its_class,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_found(way):
    model = nn.Linear(2, 1)
    assert any(each is model for each in reach(WAYS[way](model)).modules)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and still in use
@pytest.mark.parametrize("compiled", ["script", "trace"])
def test_a_model_of_torchscript_is_found(compiled):
    model = nn.Linear(2, 1)
    x = torch.ones(1, 2)
    model = torch.jit.script(model) if compiled == "script" else torch.jit.trace(model, x)
    assert any(each is model for each in reach(partial(plain, model=model)).modules)
