"""aggregate_gradients of weightings that read all products of gradients, against the formulas."""

import pytest
import torch

import gradagree_opt as ga
from gradagree_opt.engines import candidates
from gradagree_testing.configurations import CONFIGURATIONS, EQUAL

from .models import models

MODELS = models(torch.float64)
SOME = ("equal", "equal-inner", "power-2", "geometric-median")
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
each_configuration = pytest.mark.parametrize(
    "configuration", [c for c in CONFIGURATIONS if c.name in SOME], ids=str
)


def aggregate(model, configuration, **options):
    return ga.aggregate_gradients(
        model.loss_fn, model.params, model.tasks, configuration.make(), **options
    )


def assert_equals_loop(result, model, configuration):
    """The weights of the formulas, on the gradients of a loop of backward()."""
    gradients, losses = model.loop()
    torch.testing.assert_close(result.weights, configuration.weigh(gradients), rtol=1e-9, atol=0)
    expected = configuration.combine(gradients)
    torch.testing.assert_close(result.update, expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(result.losses, losses, rtol=1e-12, atol=0)


@each_model
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_stacked_gives_equal_agreement_of_the_gradients_of_a_loop(model, chunk_size):
    result = aggregate(model, EQUAL, engine="stacked", chunk_size=chunk_size)
    assert_equals_loop(result, model, EQUAL)


@each_configuration
def test_auto_holds_the_stack_however_large_it_is(configuration, monkeypatch):
    monkeypatch.setattr(candidates, "STACK_BYTES", 0)
    model = MODELS["mlp"]
    result = aggregate(model, configuration)
    assert result.engine == "stacked"
    assert_equals_loop(result, model, configuration)


@each_configuration
@pytest.mark.parametrize("engine", ["matrix_free", "streamed"])
def test_an_engine_that_holds_no_stack_names_the_one_that_does(configuration, engine):
    message = rf"engine='{engine}' can serve, found that its weighting reads cosines, .*; take "
    with pytest.raises(ValueError, match=rf"{message}engine='stacked'$") as caught:
        aggregate(MODELS["mlp"], configuration, engine=engine)
    assert "\n" not in str(caught.value)


@pytest.mark.compiled
def test_a_compiled_call_gives_it_too():
    for _ in range(2):
        assert_equals_loop(aggregate(MODELS["mlp"], EQUAL, compile=True), MODELS["mlp"], EQUAL)
