"""Options of a wrong kind: one sentence from the constructor or the call, and no foreign error."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import gradagree_opt as ga

STACK = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def loss_fn(w, x):
    return ((w - x) ** 2).mean()


def inner(**options):
    rate = options.pop("lr", 0.1)
    loop = ga.InnerSGD(rate, options.pop("steps", 1), **options)
    return ga.MAML(loss_fn, loop).adapt(torch.zeros(2), STACK)


def meta(make, **options):
    loop = options.pop("inner", ga.InnerSGD(0.1, 1))
    return make(options.pop("loss_fn", loss_fn), loop, **options)


def drawn(generator):
    return ga.Aggregator(lambda statistics: statistics.row_sums, generator=generator)


TEXT, ARRAY, ROW = "1", np.ones(2), torch.ones(3)
NUMBER = [TEXT, None, math.nan, math.inf, True, torch.tensor(0.5), ROW, ARRAY, [1.0], {}, 1j]
CHOICE = [TEXT, math.nan, ROW, ARRAY, [1.0], 3]
COUNT = [TEXT, math.nan, math.inf, 1.5, -1, ROW, ARRAY, [1], {}]
FUNCTION = [TEXT, None, 1.0, ROW, ARRAY]

collected = partial(ga.aggregate_gradients, loss_fn, torch.zeros(2), STACK, ga.Mean())
OPTIONS = {
    "GradientAgreement.temperature": (ga.GradientAgreement, "temperature", NUMBER),
    "EqualAgreement.damping": (ga.EqualAgreement, "damping", NUMBER),
    "GramianPower.power": (ga.GramianPower, "power", NUMBER),
    "GramianPower.damping": (partial(ga.GramianPower, -1), "damping", NUMBER),
    "GradientAgreement.include_self": (ga.GradientAgreement, "include_self", CHOICE),
    "GradientAgreement.negative": (ga.GradientAgreement, "negative", CHOICE),
    "EqualAgreement.similarity": (ga.EqualAgreement, "similarity", CHOICE),
    "EqualAgreement.scope": (ga.EqualAgreement, "scope", CHOICE),
    "GeometricMedian.match_norm": (ga.GeometricMedian, "match_norm", CHOICE),
    "Mean.match_norm": (ga.Mean, "match_norm", CHOICE),
    "Sum.nonfinite": (ga.Sum, "nonfinite", CHOICE),
    "Aggregator.generator": (drawn, "generator", [TEXT, 1, True, ROW, ARRAY]),
    "InnerSGD.lr": (inner, "lr", [TEXT, None, math.nan, -math.inf, 10**400, ROW, ARRAY, [0.1], 1j]),
    "InnerSGD.steps": (inner, "steps", [*COUNT, None]),
    "InnerSGD.batch_size": (inner, "batch_size", COUNT),
    "MAML.loss_fn": (partial(meta, ga.MAML), "loss_fn", FUNCTION),
    "Reptile.loss_fn": (partial(meta, ga.Reptile), "loss_fn", FUNCTION),
    "MAML.inner": (partial(meta, ga.MAML), "inner", FUNCTION),
    "Reptile.inner": (partial(meta, ga.Reptile), "inner", FUNCTION),
    "MAML.first_order": (partial(meta, ga.MAML), "first_order", CHOICE),
    "MAML.chunk_size": (partial(meta, ga.MAML), "chunk_size", COUNT),
    "Reptile.chunk_size": (partial(meta, ga.Reptile), "chunk_size", COUNT),
    "Reptile.compile": (partial(meta, ga.Reptile), "compile", CHOICE),
    "aggregate_gradients.chunk_size": (collected, "chunk_size", COUNT),
    "aggregate_gradients.compile": (collected, "compile", CHOICE),
    "aggregate_gradients.randomness": (collected, "randomness", CHOICE),
    "aggregate_gradients.engine": (collected, "engine", CHOICE),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_is_refused_in_one_sentence_that_names_the_option(option: str, without_type_checks: None):
    call, name, wrong = OPTIONS[option]
    for value in wrong:
        with pytest.raises((ValueError, TypeError), match=r"^expected ") as caught:
            call(**{name: value})
        words = str(caught.value)
        named = "Generator" if name == "generator" else name
        assert named in words and "\n" not in words


def rates(value: Any) -> dict[str, Any]:
    return {"w": value, "b": torch.tensor(0.1)}


@pytest.mark.parametrize("shape", [(2, 1), (3,), (1, 1, 2)])
def test_a_rate_that_does_not_broadcast_to_its_parameter_is_refused(shape):
    params = {"w": torch.zeros(2), "b": torch.zeros(())}
    loop = ga.InnerSGD(rates(torch.full(shape, 0.1)), 1)
    with pytest.raises(ValueError, match=r"lr to broadcast to .* a parameter of shape \[2\]"):
        loop(lambda p, x: loss_fn(p["w"], x) + p["b"], params, STACK[0])


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_a_rate_that_broadcasts_to_its_parameter_is_taken(shape):
    params = {"w": torch.zeros(2), "b": torch.zeros(())}
    loop = ga.InnerSGD(rates(torch.full(shape, 0.5)), 1)
    adapted = loop(lambda p, x: loss_fn(p["w"], x) + p["b"], params, STACK[0])
    torch.testing.assert_close(adapted["w"], 0.5 * STACK[0])


@pytest.mark.parametrize("make", [ga.Mean, ga.EqualAgreement, ga.GradientAgreement])
def test_the_length_of_a_method_that_raises_where_scores_cancel_is_refused(make):
    raising = ga.GradientAgreement(degenerate="raise")
    with pytest.raises(ValueError, match=r"a length for every batch, .*degenerate='raise'.*; give"):
        make(match_norm=raising)
    assert make(match_norm=ga.GradientAgreement(degenerate="zero"))(STACK).shape == (2,)
