"""The aggregator inside torch's transforms: vmap, autocast, GradScaler, meta tensors, autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import gradagree_opt as ga
from gradagree_testing.configurations import CONFIGURATIONS, METHODS, Configuration
from gradagree_testing.looping import every

DETERMINISTIC = [c for c in CONFIGURATIONS if c.name != "random"]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problems() -> dict[str, Tensor]:
    """Three batches of five tasks: one whose signals cancel, one that is small, one large."""
    stack = {"w": rows(3, 5, 4, 2).double(), "b": rows(3, 5, seed=1).double()}
    for leaf in stack.values():
        whole = leaf[0].mul(8).round()  # sums of small integers are exact in whatever order
        leaf[0] = torch.cat([whole[:2], -whole[:2], torch.zeros_like(whole[:1])])
        leaf[1] *= 1e-40
        leaf[2] *= 1e40
    return stack


@every(configuration=DETERMINISTIC, scope=["global", "leaf"])
def test_vmap_over_problems_is_a_loop_over_them(
    configuration: Configuration, scope: str, without_type_checks: None
):
    aggregator = configuration.make(nonfinite="propagate")
    aggregator.scope = scope
    stacks = problems()
    mapped = torch.func.vmap(lambda stack: tuple(aggregator.aggregate(stack)))(stacks)
    for index in range(3):
        one = aggregator.aggregate(tree_map(lambda leaf, i=index: leaf[i], stacks))
        found = tree_map(lambda leaf, i=index: leaf[i], mapped)
        scale = max(leaf[index].abs().max().item() for leaf in stacks.values())
        assert_close(found[0], one[0], rtol=1e-7, atol=1e-13 * scale)
        known = 2 if index == 0 else 4  # of an update that cancels the rest may be rounding
        for expected, value in zip(one[1:known], found[1:known], strict=True):
            assert_close(value, expected, rtol=1e-7, atol=1e-13, equal_nan=True)


def test_vmap_drops_tasks_problem_by_problem(without_type_checks: None):
    stacks = rows(3, 5, 4)
    stacks[0, 1, 2] = torch.nan
    stacks[2, 4] = torch.inf
    aggregator = ga.GradientAgreement(nonfinite="drop")
    weights = torch.func.vmap(lambda stack: aggregator.aggregate(stack).weights)(stacks)
    for stack, row in zip(stacks, weights, strict=True):
        assert_close(row, aggregator.aggregate(stack).weights)


@pytest.mark.parametrize(
    "aggregator",
    [
        ga.Mean(),
        ga.EqualAgreement(scope="leaf"),
        ga.GradientAgreement(degenerate="raise", nonfinite="drop"),
    ],
    ids=repr,
)
def test_values_that_nobody_can_look_at_want_another_policy(
    aggregator: ga.Aggregator, without_type_checks: None
):
    sentence = "values can be looked at, .* give nonfinite='propagate', and no degenerate='raise'"
    with pytest.raises(ValueError, match=sentence):
        torch.func.vmap(aggregator)(rows(3, 5, 4))
    with pytest.raises(ValueError, match=sentence):
        torch.func.functionalize(aggregator)(rows(5, 4))
    with pytest.raises(ValueError, match=sentence):
        aggregator(rows(5, 4).to("meta"))
    if torch.__version__ >= "2.6":  # before, torch shows no value of a gradient on its way
        assert torch.func.jacrev(aggregator)(rows(5, 4)).shape == (4, 5, 4)


def test_vmap_over_random_weights_takes_draws_made_beforehand(without_type_checks: None):
    random = ga.RandomWeights(torch.Generator().manual_seed(0), nonfinite="propagate")
    stacks, draws = rows(3, 5, 4), torch.stack([random.draw(5) for _ in range(3)])

    def weights(stack: Tensor, draws: Tensor) -> Tensor:
        return random.holding(draws).aggregate_unchecked(stack).weights

    assert_close(torch.func.vmap(weights)(stacks, draws), draws / draws.sum(1, keepdim=True))


@every(configuration=CONFIGURATIONS, dtype=[torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit(configuration: Configuration, dtype: torch.dtype):
    stack = {"w": rows(6, 30).to(dtype), "b": rows(6, seed=1).to(dtype)}
    plain = configuration.make().aggregate(stack)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = configuration.make().aggregate(stack)
    torch.testing.assert_close(tuple(cast), tuple(plain), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scope", ["leaf", lambda path: path])
def test_autocast_changes_no_bit_of_grouped_weights(scope: Any):
    stack = {"w": rows(6, 30), "b": rows(6, seed=1)}
    plain = ga.GradientAgreement(scope=scope).aggregate(stack, tree_map(torch.clone, stack))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ga.GradientAgreement(scope=scope).aggregate(stack, tree_map(torch.clone, stack))
    assert_close(tuple(cast), tuple(plain), rtol=0, atol=0, equal_nan=True)


@every(configuration=DETERMINISTIC)
def test_a_loss_scale_scales_the_update_and_leaves_the_weights(configuration: Configuration):
    stack = {"w": rows(6, 30), "b": rows(6, seed=1)}
    plain = configuration.make(nonfinite="propagate").aggregate(stack)
    scaled = configuration.make(nonfinite="propagate").aggregate(
        tree_map(lambda leaf: leaf * 65536.0, stack)
    )
    assert_close(scaled.weights, plain.weights)
    assert_close(scaled.update, tree_map(lambda leaf: leaf * 65536.0, plain.update))


def test_gradscaler_unscales_the_update_and_skips_a_step_that_is_not_finite():
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    aggregator = ga.GradientAgreement(nonfinite="propagate")
    gradients = rows(5, 4)
    expected = aggregator(gradients)

    scaler.scale(torch.ones(()))  # a scaler is set up by its first use
    parameter.grad = aggregator(gradients * 1024.0)
    scaler.step(optimizer)
    scaler.update()
    assert_close(parameter.detach(), -expected)

    gradients[3, 0] = torch.inf
    parameter.grad = aggregator(gradients * scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()
    assert_close(parameter.detach(), -expected)
    assert scaler.get_scale() == 512.0


@every(configuration=CONFIGURATIONS, nonfinite=["propagate", "drop"])
def test_tensors_without_data_pass_so_nothing_is_read_on_the_host_nor_copied_from_it(
    configuration: Configuration, nonfinite: str, host_reads: list[str]
):
    host_reads.clear()  # of the case before
    stack = {"w": torch.empty(6, 3, 2, device="meta"), "b": torch.empty(6, device="meta")}
    result = configuration.make(nonfinite=nonfinite).aggregate(stack)
    draws = ["_to_copy"] if configuration.name == "random" else []  # of a generator on the host
    assert host_reads == draws
    assert result.update["w"].shape == (3, 2)
    assert result.update["b"].shape == ()
    assert result.weights.is_meta
    assert all(value.is_meta for value in result.diagnostics)


def test_second_derivatives_pass_through_the_directions():
    """The update of g_i = ∂/∂θ of Σ θ³·c_i is 3 θ² Σ w_i c_i: its derivative 6 θ Σ w_i c_i."""
    theta = torch.tensor([2.0], requires_grad=True)
    signs = torch.tensor([[1.0], [2.0], [-0.5]])
    (slopes,) = torch.autograd.grad((theta**3).sum(), theta, create_graph=True)
    result = ga.GradientAgreement().aggregate(slopes * signs)
    (second,) = torch.autograd.grad(result.update, theta)
    assert_close(second, 12 * (result.weights @ signs))


def test_under_no_grad_and_inference_mode_the_update_needs_no_graph():
    stack = rows(4, 3).requires_grad_()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not ga.GradientAgreement()(stack).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own
@pytest.mark.parametrize("configuration", METHODS, ids=str)
def test_derivatives_of_torch_func_pass_through_the_directions_with_constant_weights(
    configuration: Configuration,
):
    stack, tangent, cotangent = rows(4, 3).double(), rows(4, 3, seed=1).double(), rows(3).double()
    aggregator, weights = configuration.make(nonfinite="propagate"), configuration.weigh(stack)
    _, derivative = torch.func.jvp(aggregator, (stack,), (tangent,))
    assert_close(derivative, weights @ tangent)
    update, pull_back = torch.func.vjp(aggregator, stack)
    assert_close(update, weights @ stack)
    assert_close(pull_back(cotangent), (torch.outer(weights, cotangent),))
    slope = torch.func.grad(lambda stack: aggregator(stack) @ cotangent)(stack)
    assert_close(slope, torch.outer(weights, cotangent))
