"""Engines called where autograd is off, or within a transform of torch.func."""

import pytest
import torch

import gradagree_opt as ga

from .test_choice import MODELS, aggregate, assert_equals_loop, each_engine


def test_streamed_refuses_inference_mode():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"found torch.inference_mode\(\)"):
        aggregate(MODELS["mlp"], ga.Mean(), engine="streamed")


TRANSFORMS = {
    "vmap": lambda step, x: torch.func.vmap(step)(x.unsqueeze(0)),
    "grad": lambda step, x: torch.func.grad(lambda x: step(x).sum())(x),
    "jvp": lambda step, x: torch.func.jvp(step, (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_streamed_refuses_the_transforms_of_torch_func(transform):
    aggregator = ga.GradientAgreement(nonfinite="propagate")

    def loss_fn(w, x):
        return ((w - x) ** 2).mean()

    def step(params):
        tasks = torch.arange(12.0).reshape(4, 3)
        result = ga.aggregate_gradients(loss_fn, params, tasks, aggregator, engine=engine)
        return result.update

    engine = "streamed"
    with pytest.raises(ValueError, match=r"transforms of torch\.func, .* take engine='stacked'"):
        TRANSFORMS[transform](step, torch.ones(3))
    engine = "stacked"
    TRANSFORMS[transform](step, torch.ones(3))


@each_engine
def test_parameters_of_inference_mode_are_differentiated_outside_of_it(engine):
    model = MODELS["mlp"]
    with torch.inference_mode():
        params = {name: p.clone() for name, p in model.params.items()}
    aggregator = ga.GradientAgreement()
    result = ga.aggregate_gradients(model.loss_fn, params, model.tasks, aggregator, engine=engine)
    assert_equals_loop(result, model, aggregator)
