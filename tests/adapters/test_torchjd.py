"""Our methods inside TorchJD: autojac, autogram, and their weights against the reference."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradagree_testing import reference
from gradagree_testing.configurations import AGREEMENTS, EQUAL, EQUALS, PAPER, Configuration
from gradagree_testing.looping import every
from gradagree_testing.samplers import SAMPLERS

pytest.importorskip("torchjd", reason="torchjd is not installed")

from gradagree_opt.adapters.torchjd import (
    AgreementWeighting,
    EqualAgreement,
    EqualAgreementWeighting,
    GradientAgreement,
)
from torchjd.aggregation import IMTLG
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad, mtl_backward

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Method(NamedTuple):
    """A method as TorchJD's weighting and aggregator, and its weights by the formulas."""

    weighting: Any
    aggregator: Any
    configuration: Configuration


METHODS = {
    "agreement": Method(AgreementWeighting, GradientAgreement, PAPER),
    "equal": Method(EqualAgreementWeighting, EqualAgreement, EQUAL),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def matrix(seed=0, n=4, d=12):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("weighting", "configuration"),
    [
        *((AgreementWeighting, configuration) for configuration in AGREEMENTS),
        *((EqualAgreementWeighting, configuration) for configuration in EQUALS),
    ],
    ids=str,
)
@every(sampler=SAMPLERS)
def test_weights_of_a_gramian_are_those_of_the_reference(weighting, configuration, sampler):
    jacobian = sampler(torch.Generator().manual_seed(1))
    exact = reference.exact(jacobian) if len(jacobian) < 100 else jacobian.numpy()
    expected = configuration.weights(reference.gram(exact))
    weights = weighting(**configuration.options)(jacobian @ jacobian.T)
    np.testing.assert_allclose(weights.numpy(), expected.astype(float), rtol=1e-9, atol=1e-9)


@each_method
@given(st.integers(0, 100), st.floats(-6, 6), st.randoms())
def test_weights_ignore_a_common_scale_and_follow_the_order_of_the_tasks(
    method, seed, exponent, random
):
    jacobian = matrix(seed)
    order = random.sample(range(4), 4)
    weights = method.weighting()(jacobian @ jacobian.T)
    moved = 10**exponent * jacobian[order]
    torch.testing.assert_close(method.weighting()(moved @ moved.T), weights[order])


def test_small_damping_gives_the_direction_of_imtl_g_where_the_tasks_are_independent():
    jacobian = matrix()
    found, expected = EqualAgreement(damping=1e-12)(jacobian), IMTLG()(jacobian)
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())


# -- autojac ---------------------------------------------------------------------------------------


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def data(dtype, n=4):
    x = matrix(1, n, 6 * 3).reshape(n, 6, 3).to(dtype)
    y = matrix(2, n, 6).reshape(n, 6, 1).to(dtype)
    return x, y


def losses_of(net, x, y):
    return ((net(x) - y) ** 2).mean((1, 2))


def one_by_one(losses, parameters):
    """The gradient of each loss as one row, in float64."""
    parameters = list(parameters)
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in each]) for each in grads]).double()


def assert_gradients(net, configuration, rows):
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    expected = configuration.combine(rows)
    apart = (found - expected).norm() / expected.norm()
    assert apart <= configuration.tolerance(found.dtype)


@each_dtype
@each_method
@pytest.mark.parametrize("optimized", [False, True], ids=["jacobian", "gramian"])
def test_jac_to_grad_combines_the_gradients_with_the_weights_of_the_reference(
    dtype, method, optimized
):
    net, (x, y), configuration = network(dtype), data(dtype), method.configuration
    rows = one_by_one(losses_of(net, x, y), net.parameters())
    backward(losses_of(net, x, y))
    weights = jac_to_grad(
        net.parameters(), method.aggregator(), optimize_gramian_computation=optimized
    )
    assert_gradients(net, configuration, rows)
    assert weights.dtype == dtype
    expected = configuration.weigh(rows).to(dtype)
    torch.testing.assert_close(weights, expected, rtol=0, atol=configuration.tolerance(dtype))


@each_dtype
@each_method
def test_mtl_backward_aggregates_the_trunk_and_leaves_the_heads_their_own(dtype, method):
    trunk, (x, y) = network(dtype)[:2], data(dtype)
    heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(4)).to(dtype)
    features = trunk(x[0])
    losses = [((head(features) - y[i]) ** 2).mean() for i, head in enumerate(heads)]
    rows = one_by_one(losses, trunk.parameters())
    heads_own = [
        torch.autograd.grad(loss, head.parameters(), retain_graph=True)
        for loss, head in zip(losses, heads, strict=True)
    ]
    mtl_backward(losses, features=features)
    jac_to_grad(trunk.parameters(), method.aggregator())
    assert_gradients(trunk, method.configuration, rows)
    for head, grads in zip(heads, heads_own, strict=True):
        torch.testing.assert_close([p.grad for p in head.parameters()], list(grads))


@each_dtype
@each_method
@pytest.mark.parametrize("batch_dim", [0, None])
def test_autogram_engine_and_weighting_give_the_update_of_the_reference(dtype, method, batch_dim):
    net, (x, y) = network(dtype), data(dtype)
    rows = one_by_one(losses_of(net, x, y), net.parameters())
    engine, weighting = Engine(net, batch_dim=batch_dim), method.weighting()
    losses = losses_of(net, x, y)
    losses.backward(weighting(engine.compute_gramian(losses)))
    assert_gradients(net, method.configuration, rows)


class Spare(nn.Module):
    """A frozen body, BatchNorm, and a parameter that no loss depends on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 5).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 1)
        self.spare = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x.flatten(0, 1))))).reshape(*x.shape[:2], 1)


@each_method
@pytest.mark.parametrize("way", ["autojac", "autogram"])
def test_frozen_and_unused_parameters_and_batch_norm_are_as_in_a_backward_pass(way, method):
    ours, theirs, (x, y) = Spare(), Spare(), data(torch.float64)
    losses = losses_of(theirs, x, y)
    used = [*theirs.norm.parameters(), *theirs.head.parameters()]
    rows = [torch.autograd.grad(loss, used, retain_graph=True) for loss in losses]
    stack = [torch.stack(leaves) for leaves in zip(*rows, strict=True)]
    if way == "autojac":
        backward(losses_of(ours, x, y))
        # TorchJD wants those parameters alone that a loss depends on.
        known = [p for p in ours.parameters() if getattr(p, "jac", None) is not None]
        jac_to_grad(known, method.aggregator())
    else:
        engine = Engine(ours, batch_dim=None)
        losses = losses_of(ours, x, y)
        losses.backward(method.weighting()(engine.compute_gramian(losses)))
    assert ours.spare.grad is None and ours.body.weight.grad is None
    found = [p.grad for p in (*ours.norm.parameters(), *ours.head.parameters())]
    expected = method.configuration.combine(stack)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close([*ours.buffers()], [*theirs.buffers()], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("ours", "options", "formula"),
    [
        (
            GradientAgreement,
            {"similarity": "cosine", "include_self": False, "negative": "clip"},
            reference.agreement,
        ),
        (EqualAgreement, {"damping": 0.5, "similarity": "inner"}, reference.equal),
    ],
)
def test_options_reach_the_weighting(ours, options, formula):
    jacobian = matrix()
    weights = formula(reference.gram(jacobian.numpy()), **options)
    torch.testing.assert_close(ours(**options)(jacobian), torch.from_numpy(weights) @ jacobian)
    shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert shown in repr(ours(**options).weighting)


@each_method
def test_weights_are_constants_of_differentiation(method):
    jacobian = matrix().requires_grad_()
    assert not method.weighting()(jacobian @ jacobian.T).requires_grad


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gramian_gives_weights_of_its_dtype(method, dtype):
    gramian = (matrix() @ matrix().T).to(dtype)
    weights = method.weighting()(gramian)
    assert weights.dtype == dtype
    expected = method.configuration.weights(gramian.double().numpy())
    torch.testing.assert_close(weights, torch.from_numpy(expected).to(dtype))


@each_method
def test_nan_in_the_gramian_reaches_the_weights(method):
    gramian = matrix() @ matrix().T
    gramian[1] = gramian[:, 1] = torch.nan
    assert method.weighting()(gramian).isnan().all()


@each_method
@pytest.mark.parametrize("shape", [(3, 4), (3,), (0, 0), (2, 2, 2)])
def test_what_is_no_gramian_is_refused(method, shape):
    with pytest.raises(ValueError, match=r"a Gramian \[n, n\] .* give jacobian @ jacobian\.T"):
        method.weighting()(torch.ones(shape))


@each_method
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_gramian_that_is_not_floating_point_is_refused(method, dtype):
    with pytest.raises(TypeError, match=f"floating-point Gramian, found {dtype}; give gramian"):
        method.weighting()(torch.eye(3).to(dtype))


def test_cancelling_scores_raise_where_asked_to():
    jacobian = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    with pytest.raises(ValueError, match="scores that cancel to zero; give degenerate="):
        GradientAgreement(degenerate="raise")(jacobian)
    assert torch.equal(GradientAgreement(degenerate="zero")(jacobian), torch.zeros(2))


def test_unknown_option_is_refused(without_type_checks):
    with pytest.raises(ValueError, match="expected negative to be one of 'keep', 'clip'"):
        GradientAgreement(negative="drop")
    with pytest.raises(ValueError, match="expected a positive number for damping, found 0"):
        EqualAgreement(damping=0)
