"""Meta-algorithms that are pickled, saved and copied give the steps of the original."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import gradagree_opt as ga

from .problems import assert_same, loss_fn, problem
from .rules import flat

CASE = problem()
INNER = ga.InnerSGD(0.1, 2)
MADE = {
    "MAML": ga.MAML(loss_fn, INNER),
    "MAML of gradients": ga.MAML(loss_fn, INNER, signal="gradient", engine="stacked"),
    "FOMAML": ga.MAML(loss_fn, INNER, first_order=True, chunk_size=2),
    "MetaSGD": ga.MetaSGD(loss_fn, 2),
    "Reptile": ga.Reptile(loss_fn, INNER),
}


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "save": saved,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("aggregator", [ga.GradientAgreement(), ga.EqualAgreement()], ids=repr)
def test_the_steps_are_those_of_the_original(way, name, aggregator):
    params = CASE.meta(name == "MetaSGD")
    expected = MADE[name].step(params, CASE.tasks, aggregator)
    found = way(MADE[name]).step(params, CASE.tasks, aggregator)
    assert_same(found.update, flat(expected.update), tolerance=0)
    assert found.engine == expected.engine


class Loss(nn.Module):
    """A loss function with a state of its own."""

    def __init__(self):
        super().__init__()
        self.factor = 1.0

    def forward(self, w, x):
        return self.factor * ((w - x) ** 2).mean()


@pytest.mark.parametrize("way", [WAYS["pickle"], WAYS["deepcopy"]], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("make", [ga.MAML, ga.Reptile])
def test_a_copy_has_a_loss_of_its_own(way, make):
    loss = Loss()
    original = make(loss, ga.InnerSGD(0.1, 1))
    other = way(original)
    loss.factor = 3.0
    x = torch.tensor([[1.0], [2.0]])
    tasks, w = {"support": x, "query": x}, torch.zeros(())
    expected = make(Loss(), ga.InnerSGD(0.1, 1)).step(w, tasks, ga.Mean())
    assert torch.equal(other.step(w, tasks, ga.Mean()).update, expected.update)
    assert not torch.equal(original.step(w, tasks, ga.Mean()).update, expected.update)
