"""Stacks of every structure, layout and dtype give what their concatenated matrix gives."""

from collections import OrderedDict
from typing import Any, NamedTuple

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_structure

import gradagree_opt as ga
from gradagree_opt.core.blocks import rows
from gradagree_opt.core.stacks import leaf_paths, mask_rows
from gradagree_testing import reference
from gradagree_testing.reference import exact

N = 5


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, *shape, generator=generator).to(dtype)


def structures() -> dict[str, Any]:
    a, b, c = leaf(3, 2), leaf(4, seed=1), leaf(seed=2)
    return {
        "tensor": a,
        "list": [a, b, c],
        "tuple": (a, b, c),
        "dict": {"w": a, "b": b},
        "ordered dict": OrderedDict(w=a, b=b),
        "named tuple": Layer(a, b),
        "nested": {"layers": [Layer(a, b), {"scale": (c,)}], "head": b},
        "0-d parameters": {"scale": c, "shift": leaf(seed=3)},
        "zero elements": {"w": a, "empty": leaf(0), "also": leaf(3, 0, 2)},
        "nothing but zero elements": {"empty": leaf(0)},
        "channels last": {"w": leaf(3, 4, 4).to(memory_format=torch.channels_last), "b": b},
        "transposed": {"w": leaf(3, 4).transpose(1, 2), "b": b},
        "task axis not outermost": leaf(7).T.contiguous().T,
        "strided": {"w": leaf(8)[:, ::3], "b": b},
        "expanded over parameters": {"w": c[:, None].expand(N, 6), "b": b},
        "expanded over tasks": {"w": leaf(6)[:1].expand(N, 6), "b": b},
        "mixed dtypes": {
            "double": leaf(3, dtype=torch.float64),
            "float": b,
            "half": leaf(5, seed=4, dtype=torch.float16),
            "brain": leaf(2, 2, seed=5, dtype=torch.bfloat16),
        },
        "half dtypes": [leaf(3, dtype=torch.float16), leaf(3, seed=1, dtype=torch.bfloat16)],
    }


@pytest.mark.parametrize("name", structures())
@pytest.mark.parametrize("similarity", ["inner", "cosine"])
def test_a_stack_is_aggregated_as_its_matrix(name: str, similarity: str):
    stack = structures()[name]
    leaves = tree_leaves(stack)
    before = [leaf.clone() for leaf in leaves]
    matrix = exact(torch.cat([leaf.flatten(1).double() for leaf in map(at_least_2d, leaves)], 1))
    expected = reference.agreement(reference.gram(matrix), similarity=similarity)
    result = ga.GradientAgreement(similarity=similarity).aggregate(stack)

    assert tree_structure(result.update) == tree_structure(stack)
    wide = torch.float64 if name == "mixed dtypes" else torch.float32
    assert_close(result.weights, torch.tensor(expected.astype(float)).to(wide))
    for update, values, unchanged in zip(tree_leaves(result.update), leaves, before, strict=True):
        assert update.shape == values.shape[1:]
        sums = torch.einsum("n,n...->...", result.weights.double(), values.double())
        assert_close(update, sums.to(values.dtype))
        assert values.equal(unchanged)


def at_least_2d(leaf: Tensor) -> Tensor:
    return leaf if leaf.ndim > 1 else leaf[:, None]


def test_shapes_and_dtypes_are_checked_while_the_tests_run():
    with pytest.raises(BeartypeCallHintViolation):
        rows(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(BeartypeCallHintViolation):
        mask_rows(leaf(2), torch.ones(N, 1, dtype=torch.bool))


def test_a_result_has_the_sizes_that_its_arguments_gave():
    @jaxtyping.jaxtyped(typechecker=beartype)
    def first_rows(stack: Float[Tensor, "n d"], count: int) -> Float[Tensor, "n d"]:
        return stack[:count]

    first_rows(torch.zeros(3, 2), 3)
    with pytest.raises(BeartypeCallHintViolation):
        first_rows(torch.zeros(3, 2), 2)


def test_leaves_are_named_by_their_path():
    stack = {"layers": [Layer(leaf(1), leaf(1)), leaf(1)], 3: leaf(1)}
    assert leaf_paths(stack) == ["layers.0.weight", "layers.0.bias", "layers.1", "3"]


def test_a_parameter_is_aggregated_as_the_tensor_it_is():
    values = leaf(3)
    assert_close(ga.GradientAgreement()(torch.nn.Parameter(values)), ga.GradientAgreement()(values))


@pytest.mark.parametrize("splits", [(1, 11), (4, 4, 4), (0, 12, 0), (1,) * 12])
def test_splitting_the_parameters_over_leaves_changes_nothing(splits: tuple[int, ...]):
    matrix = leaf(12, dtype=torch.float64)
    whole = ga.GradientAgreement().aggregate(matrix)
    split = ga.GradientAgreement().aggregate(list(matrix.split(splits, dim=1)))
    assert_close(split.weights, whole.weights)
    assert_close(split.scores, whole.scores)
    assert_close(torch.cat(split.update), whole.update)
    assert_close(split.diagnostics, whole.diagnostics, equal_nan=True)


@pytest.mark.parametrize("large", [1e-12, 1e12])
def test_a_large_leaf_beside_a_small_one_keeps_the_small_one_s_update(large: float):
    stack = {"a": leaf(4) * large, "b": leaf(4, seed=1)}
    result = ga.GradientAgreement().aggregate(stack)
    matrix = torch.cat([stack["a"].double(), stack["b"].double()], dim=1)
    weights = torch.tensor(reference.agreement(reference.gram(exact(matrix))).astype(float))
    assert_close(result.weights, weights.float())
    assert_close(result.update["a"], (weights @ stack["a"].double()).float())
    assert_close(result.update["b"], (weights @ stack["b"].double()).float())
