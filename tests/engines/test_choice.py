"""aggregate_gradients against a loop of backward() and the aggregator alone."""

import pytest
import torch

import gradagree_opt as ga

from .models import models

MODELS = models(torch.float64)
AGGREGATORS = {
    "agreement": ga.GradientAgreement,
    "mean": ga.Mean,
    "mean, longer": lambda: ga.Mean(match_norm="agreement"),
    "leaf": lambda: ga.GradientAgreement(scope="leaf"),
    "cosine": lambda: ga.GradientAgreement(similarity="cosine", match_norm="mean"),
    "random": lambda: ga.RandomWeights(torch.Generator().manual_seed(3)),
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
each_aggregator = pytest.mark.parametrize("aggregator", AGGREGATORS.values(), ids=AGGREGATORS)


@each_model
@each_aggregator
@pytest.mark.parametrize("engine", ["auto", "stacked"])
def test_equals_the_aggregator_on_the_gradients_of_a_loop(model, aggregator, engine):
    result = ga.aggregate_gradients(
        model.loss_fn, model.params, model.tasks, aggregator(), engine=engine
    )
    gradients, losses = model.loop()
    expected = aggregator().aggregate(gradients)
    torch.testing.assert_close(result.update, expected.update, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.scores, expected.scores, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.losses, losses, rtol=1e-13, atol=0)
    assert result.diagnostics.log() == pytest.approx(expected.diagnostics.log(), rel=1e-5)


@each_model
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_do_not_change_the_result(model, chunk_size):
    whole, chunked = (
        ga.aggregate_gradients(
            model.loss_fn, model.params, model.tasks, ga.GradientAgreement(), chunk_size=size
        )
        for size in (None, chunk_size)
    )
    torch.testing.assert_close(chunked.update, whole.update, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(chunked.losses, whole.losses, rtol=1e-13, atol=0)


def test_says_which_engine_ran():
    model = MODELS["mlp"]
    for engine in ("auto", "stacked"):
        result = ga.aggregate_gradients(
            model.loss_fn, model.params, model.tasks, ga.Mean(), engine=engine
        )
        assert result.engine == "stacked"


def test_an_unknown_engine_is_refused(without_type_checks):
    model = MODELS["mlp"]
    with pytest.raises(ValueError, match=r"expected engine to be one of .* found 'stack'"):
        ga.aggregate_gradients(model.loss_fn, model.params, model.tasks, ga.Mean(), engine="stack")


def test_a_nonfinite_task_is_named_or_dropped():
    model = MODELS["mlp"]
    x, y = (leaf.clone() for leaf in model.tasks)
    y[2] = float("nan")
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[2\]"):
        ga.aggregate_gradients(model.loss_fn, model.params, (x, y), ga.GradientAgreement())
    dropped = ga.aggregate_gradients(
        model.loss_fn, model.params, (x, y), ga.GradientAgreement(nonfinite="drop")
    )
    rest = [0, 1, 3, 4]
    expected = ga.aggregate_gradients(
        model.loss_fn, model.params, (x[rest], y[rest]), ga.GradientAgreement()
    )
    torch.testing.assert_close(dropped.update, expected.update, rtol=1e-12, atol=1e-14)
    assert dropped.losses.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.compiled
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_compiled_equals_eager(chunk_size):
    model = MODELS["mlp"]
    eager, first, again = (
        ga.aggregate_gradients(
            model.loss_fn,
            model.params,
            model.tasks,
            ga.GradientAgreement(),
            chunk_size=chunk_size,
            compile=compiled,
        )
        for compiled in (False, True, True)
    )
    for result in (first, again):
        torch.testing.assert_close(result.update, eager.update, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(result.weights, eager.weights, rtol=1e-11, atol=0)
        torch.testing.assert_close(result.losses, eager.losses, rtol=1e-13, atol=0)


@pytest.mark.compiled
def test_compiled_still_raises_for_a_nonfinite_task():
    model = MODELS["mlp"]
    x, y = (leaf.clone() for leaf in model.tasks)
    y[2] = float("nan")
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[2\]"):
        ga.aggregate_gradients(
            model.loss_fn, model.params, (x, y), ga.GradientAgreement(), compile=True
        )
