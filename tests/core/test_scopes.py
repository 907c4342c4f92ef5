"""Weights for all parameters, for each tensor, or for each group that a function names."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga
from gradagree_testing import reference
from gradagree_testing.configurations import AGREEMENTS, Configuration
from gradagree_testing.reference import exact

N = 6


def stack(dtype: torch.dtype = torch.float64, shift: float = 0.0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return (shift + torch.randn(N, *shape, generator=generator)).to(dtype)

    return {
        "body": {"weight": leaf(3, 2), "bias": leaf(3)},
        "head": {"weight": leaf(1, 3), "bias": leaf(1), "scale": leaf()},
    }


def matrix(*leaves: Tensor) -> Tensor:
    return torch.cat([leaf.reshape(N, -1).double() for leaf in leaves], dim=1)


def expected_weights(configuration: Configuration, *leaves: Tensor) -> Tensor:
    gram = reference.gram(exact(matrix(*leaves)))
    return torch.tensor(configuration.weights(gram).astype(float))


def module(path: str) -> str:
    return path.split(".")[0]


def kind(path: str) -> str:
    return path.rsplit(".", maxsplit=1)[-1]


@pytest.mark.parametrize("configuration", AGREEMENTS, ids=str)
def test_scope_leaf_weights_every_tensor_by_itself(configuration: Configuration):
    grads = stack()
    result = configuration.make(scope="leaf").aggregate(grads)
    expected = torch.stack([expected_weights(configuration, leaf) for leaf in tree_leaves(grads)])
    assert_close(result.weights, expected)
    assert result.scores.shape == expected.shape
    for row, leaf, update in zip(
        expected, tree_leaves(grads), tree_leaves(result.update), strict=True
    ):
        assert_close(update, torch.einsum("n,n...->...", row, leaf))


@pytest.mark.parametrize("configuration", AGREEMENTS, ids=str)
@pytest.mark.parametrize("scope", [module, kind])
def test_a_callable_scope_weights_the_groups_that_it_names(configuration: Configuration, scope):
    grads = stack()
    if scope is module:
        members = {"body": ["weight", "bias"], "head": ["weight", "bias", "scale"]}
        groups = [[grads[name][key] for key in keys] for name, keys in members.items()]
    else:
        groups = [
            [grads["body"]["weight"], grads["head"]["weight"]],
            [grads["body"]["bias"], grads["head"]["bias"]],
            [grads["head"]["scale"]],
        ]
    result = configuration.make(scope=scope).aggregate(grads)
    expected = torch.stack([expected_weights(configuration, *leaves) for leaves in groups])
    assert_close(result.weights, expected)
    order = [0, 0, 1, 1, 1] if scope is module else [0, 1, 0, 1, 2]
    for group, leaf, update in zip(
        order, tree_leaves(grads), tree_leaves(result.update), strict=True
    ):
        assert_close(update, torch.einsum("n,n...->...", expected[group], leaf))


def test_scope_leaf_tells_leaves_of_one_path_apart():
    grads = {"a.b": torch.tensor([[1.0], [1.0]]), "a": {"b": torch.tensor([[1.0], [-3.0]])}}
    weights = ga.agreement_weights(grads, scope="leaf")
    expected = [[0.5, 0.5], [-0.25, 0.75]]
    assert sorted(weights.tolist()) == sorted(expected)


def test_one_group_of_all_leaves_is_the_global_scope():
    grads = stack(torch.float32)
    whole = ga.GradientAgreement().aggregate(grads)
    grouped = ga.GradientAgreement(scope=lambda path: "all").aggregate(grads)
    assert grouped.weights.shape == (1, N)
    assert_close(grouped.weights[0], whole.weights)
    assert_close(grouped.update, whole.update)


def test_a_callable_scope_sees_the_paths_of_the_leaves():
    seen = []
    ga.GradientAgreement(scope=lambda path: seen.append(path) or "all")(stack())
    assert seen == ["body.weight", "body.bias", "head.weight", "head.bias", "head.scale"]


def test_groups_differ_in_scale_and_in_sign_of_their_weights():
    grads = {
        "a": torch.tensor([[1.0], [1.0], [-1.0]]) * 1e30,
        "b": torch.tensor([[-1.0], [1.0], [1.0]]) * 1e-30,
        "c": torch.zeros(3, 2),
    }
    third = 1 / 3
    result = ga.GradientAgreement(scope="leaf").aggregate(grads)
    assert_close(
        result.weights,
        torch.tensor([[third, third, -third], [-third, third, third], [third, third, third]]),
    )
    assert result.diagnostics.degenerate.tolist() == [False, False, True]
    assert_close(result.update["a"], torch.tensor([1e30]))
    assert_close(result.update["b"], torch.tensor([1e-30]), rtol=1e-5, atol=0)


def test_norm_matching_rescales_all_groups_by_one_factor():
    grads = stack(shift=0.5)
    plain = ga.GradientAgreement(scope="leaf").aggregate(grads)
    matched = ga.GradientAgreement(scope="leaf", match_norm="mean").aggregate(grads)
    mean = tree_map(lambda leaf: leaf.mean(0), grads)
    assert_close(norm(matched.update), norm(mean), rtol=1e-12, atol=0)
    factor = norm(mean) / norm(plain.update)
    assert_close(matched.update, tree_map(lambda leaf: leaf * factor, plain.update))
    assert_close(matched.weights, plain.weights * factor)


def norm(update: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in tree_leaves(update)]).norm()


def test_dropped_tasks_have_weight_zero_in_every_group():
    grads = stack()
    grads["head"]["bias"][2] = torch.nan
    result = ga.GradientAgreement(scope="leaf", nonfinite="drop").aggregate(grads)
    kept = [0, 1, 3, 4, 5]
    rest = ga.GradientAgreement(scope="leaf").aggregate(tree_map(lambda leaf: leaf[kept], grads))
    assert (result.weights[:, 2] == 0).all()
    assert_close(result.weights[:, kept], rest.weights)
    assert_close(result.update, rest.update)


def test_a_signal_of_the_same_structure_weights_the_directions_group_by_group():
    directions, signal = stack(), tree_map(lambda leaf: leaf.flip(0) + 0.3, stack())
    result = ga.GradientAgreement(scope="leaf").aggregate(directions, signal)
    weights = ga.agreement_weights(signal, scope="leaf")
    assert_close(result.weights, weights)
    for row, leaf, update in zip(
        weights, tree_leaves(directions), tree_leaves(result.update), strict=True
    ):
        assert_close(update, torch.einsum("n,n...->...", row, leaf))
