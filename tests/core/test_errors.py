"""Bad input, each with the sentence that says what was expected, what was found, what to do."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import gradagree_opt as ga

pytestmark = pytest.mark.usefixtures("without_type_checks")


def rows(*shape: int) -> Tensor:
    return torch.zeros(*shape)


BAD_STACKS = {
    "empty pytree": ({}, ValueError, "expected {} with at least one tensor, found an empty pytree"),
    "empty list": ([], ValueError, "expected {} with at least one tensor, found an empty pytree"),
    "empty batch": (
        {"w": rows(0, 3)},
        ValueError,
        "expected {} of at least one task, found an empty task axis; skip the step",
    ),
    "unequal task axes": (
        {"w": rows(8, 3), "b": rows(7)},
        ValueError,
        "expected every leaf of the {} to have the same task axis, found 8 in 'w' and 7 in 'b'",
    ),
    "per-parameter gradients of one task": (
        [rows(64, 10), rows(64), rows(5, 64)],
        ValueError,
        "found 64 in '0' and 5 in '2'; per-parameter gradients of one task, or a list of tasks",
    ),
    "a list of tasks": (
        [{"w": rows(4, 3), "b": rows(2)}] * 3,
        ValueError,
        "found 4 in '0.w' and 2 in '0.b'; per-parameter gradients of one task, or a list of tasks,",
    ),
    "a parameter without the task axis": (
        {"w": rows(4, 3), "scale": torch.tensor(1.0)},
        ValueError,
        "{} to have the task axis first, found a tensor without axes in 'scale'; stack the tasks",
    ),
    "a sparse leaf": (
        {"w": rows(4, 3), "embedding": rows(4, 3).to_sparse()},
        TypeError,
        "expected dense {}, found torch.sparse_coo in 'embedding'; give leaf.to_dense()",
    ),
    "several devices": (
        {"w": rows(4, 3), "b": rows(4).to("meta")},
        ValueError,
        "expected {} on one device, found cpu in 'w' and meta in 'b'; bring them to one",
    ),
    "integers": (
        {"w": rows(4, 3), "counts": torch.zeros(4, dtype=torch.int64)},
        TypeError,
        "expected floating-point {}, found torch.int64 in 'counts'; leave out",
    ),
    "clients' stacks of a state_dict": (
        {name: torch.stack([t, t]) for name, t in torch.nn.BatchNorm1d(2).state_dict().items()},
        TypeError,
        "in 'num_batches_tracked'; leave out what has no gradient, as every buffer of a state_dict",
    ),
    "numbers of eight bits": (
        {"w": rows(4, 3), "b": rows(4).to(torch.float8_e4m3fn)},
        TypeError,
        "expected floating-point {}, found torch.float8_e4m3fn in 'b'; give it as float()",
    ),
    "booleans": ({"mask": rows(4) > 0}, TypeError, "found torch.bool in 'mask'"),
    "complex numbers": ([rows(4).to(torch.complex64)], TypeError, "found torch.complex64 in '0'"),
    "a number": (
        {"w": rows(4, 3), "b": 0.0},
        TypeError,
        "expected every leaf of the {} to be a tensor, found float in 'b'",
    ),
    "no gradient": (
        {"w": rows(4, 3), "unused": None},
        TypeError,
        "found NoneType in 'unused'; leave the entry out, or give zeros for a parameter",
    ),
}


@pytest.mark.parametrize("name", BAD_STACKS)
def test_bad_gradients_are_named(name: str):
    stack, error, sentence = BAD_STACKS[name]
    for call in (ga.GradientAgreement(), ga.Mean(), ga.GradientAgreement().aggregate):
        with pytest.raises(error, match=re.escape(sentence.format("gradients"))):
            call(stack)


@pytest.mark.parametrize("name", BAD_STACKS)
def test_a_bad_signal_is_named(name: str):
    stack, error, sentence = BAD_STACKS[name]
    with pytest.raises(error, match=re.escape(sentence.format("signal"))):
        ga.agreement_weights(stack)
    with pytest.raises(error, match=re.escape(sentence.format("signal"))):
        ga.GradientAgreement().aggregate(rows(4, 2), stack)


@pytest.mark.parametrize("name", BAD_STACKS)
def test_bad_directions_are_named(name: str):
    stack, error, sentence = BAD_STACKS[name]
    with pytest.raises(error, match=re.escape(sentence.format("directions"))):
        ga.GradientAgreement().aggregate(stack, signal=rows(4, 2))


def test_a_bare_tensor_is_named_without_an_empty_path():
    with pytest.raises(TypeError, match=r"found torch\.int64") as caught:
        ga.Mean()(torch.zeros(3, 2, dtype=torch.int64))
    assert "''" not in str(caught.value)


def test_signal_and_directions_need_the_same_tasks():
    sentence = "expected one signal for each of the 4 directions, found 5; both need the same tasks"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ga.GradientAgreement().aggregate(rows(4, 2), rows(5, 2))


@pytest.mark.parametrize("scope", ["leaf", lambda path: path])
def test_grouped_weights_need_signal_and_directions_of_one_structure(scope: Any):
    aggregator = ga.GradientAgreement(scope=scope)
    sentence = r"expected signal and directions of one structure for scope=.*, found two; give both"
    with pytest.raises(ValueError, match=sentence):
        aggregator.aggregate({"w": rows(4, 2), "b": rows(4)}, {"w": rows(4, 2)})
    with pytest.raises(ValueError, match=sentence):
        aggregator.aggregate({"w": rows(4, 2)}, {"v": rows(4, 2)})


OTHER = "an aggregator as gradagree_opt.Sum()"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"similarity": "dot"}, "similarity to be one of 'inner', 'cosine'; found 'dot'"),
        ({"include_self": "no"}, "include_self to be one of True, False; found 'no'"),
        ({"negative": "abs"}, "negative to be one of 'keep', 'clip'; found 'abs'"),
        ({"normalization": "l2"}, "normalization to be one of 'l1', 'softmax'; found 'l2'"),
        ({"scope": "layer"}, "scope to be one of 'global', 'leaf'; found 'layer'"),
        ({"match_norm": "sum"}, f"match_norm to be one of None, 'mean', {OTHER}; found 'sum'"),
        (
            {"match_norm": "agreement"},
            f"match_norm to be one of None, 'mean', {OTHER}; found 'agreement'",
        ),
        ({"degenerate": "nan"}, "degenerate to be one of 'uniform', 'zero', 'raise'; found 'nan'"),
        (
            {"nonfinite": "skip"},
            "nonfinite to be one of 'raise', 'drop', 'propagate'; found 'skip'",
        ),
        ({"temperature": 0.0}, "expected a positive number for temperature, found 0.0"),
        ({"temperature": -1.0}, "expected a positive number for temperature, found -1.0"),
        ({"temperature": float("nan")}, "expected a positive number for temperature, found nan"),
    ],
)
def test_an_unknown_option_is_named_with_the_choices(options: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ga.GradientAgreement(**options)
    if "match_norm" not in options:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            ga.agreement_weights(torch.ones(2, 2), **options)


@pytest.mark.parametrize("match_norm", ["mean", "sum"])
def test_the_mean_takes_no_other_word_than_agreement_for_the_norm(match_norm: str):
    sentence = f"match_norm to be one of None, 'agreement', {OTHER}; found '{match_norm}'"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ga.Mean(match_norm=match_norm)


@pytest.mark.parametrize("method", [ga.Mean, ga.EqualAgreement, ga.GradientAgreement])
def test_a_norm_to_match_is_that_of_an_aggregator_itself(method: Any):
    with pytest.raises(ValueError, match=re.escape(f"{OTHER}; found tensor([1., 1.])")):
        method(match_norm=torch.ones(2))


class Unmade(ga.Aggregator):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("method", [ga.Mean, ga.EqualAgreement, ga.GradientAgreement])
@pytest.mark.parametrize(
    ("match_norm", "sentence"),
    [
        (ga.Sum, f"match_norm with {OTHER}, found the class Sum; call it"),
        (ga.EqualAgreement, f"match_norm with {OTHER}, found the class EqualAgreement; call it"),
        (Unmade(), "Unmade.__init__ to call super().__init__(…), found no weighting; give it one"),
    ],
    ids=["a class", "another", "without its constructor"],
)
def test_a_norm_to_match_is_that_of_an_aggregator_that_was_made(
    method: Any, match_norm: Any, sentence: str
):
    with pytest.raises(TypeError, match=re.escape(f"expected {sentence}")):
        method(match_norm=match_norm)


@pytest.mark.parametrize("make", [ga.Mean, ga.Sum, ga.NormShare])
def test_a_control_names_an_unknown_policy(make: type[ga.Aggregator]):
    with pytest.raises(ValueError, match="expected nonfinite to be one of"):
        make(nonfinite="ignore")


@pytest.mark.parametrize("generator", [None, 0])
def test_random_weights_need_a_generator(generator: Any):
    found = type(generator).__name__
    with pytest.raises(TypeError, match=f"expected a torch.Generator, found {found}; pass"):
        ga.RandomWeights(generator)


def test_options_are_keywords_and_tensors_positional():
    with pytest.raises(TypeError):
        ga.GradientAgreement("inner")
    with pytest.raises(TypeError):
        ga.GradientAgreement().aggregate(directions=torch.ones(2, 2))
    with pytest.raises(TypeError):
        ga.agreement_weights(torch.ones(2, 2), "cosine")


def test_an_aggregator_shows_its_options():
    shown = repr(ga.GradientAgreement(similarity="cosine", match_norm="mean", nonfinite="drop"))
    for option in ("similarity='cosine'", "match_norm='mean'", "nonfinite='drop'"):
        assert option in shown
