"""Gradient Agreement inside TorchJD: autojac, autogram, and its weights against the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradagree_opt as ga
from gradagree_opt.statistics import from_gramian
from gradagree_testing import reference
from gradagree_testing.configurations import AGREEMENTS
from gradagree_testing.samplers import SAMPLERS

pytest.importorskip("torchjd", reason="torchjd is not installed")

from gradagree_opt.adapters.torchjd import AgreementWeighting, GradientAgreement
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad, mtl_backward

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])


def matrix(seed=0, n=4, d=12):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("configuration", AGREEMENTS, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.__name__)
def test_weights_of_a_gramian_are_those_of_the_reference(configuration, sampler):
    jacobian = sampler(torch.Generator().manual_seed(1))
    exact = reference.exact(jacobian) if len(jacobian) < 100 else jacobian.numpy()
    expected = reference.agreement(reference.gram(exact), **configuration.options)
    weights = AgreementWeighting(**configuration.options)(jacobian @ jacobian.T)
    np.testing.assert_allclose(weights.numpy(), expected.astype(float), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 100), st.floats(-6, 6), st.randoms())
def test_weights_ignore_a_common_scale_and_follow_the_order_of_the_tasks(seed, exponent, random):
    jacobian = matrix(seed)
    order = random.sample(range(4), 4)
    weights = AgreementWeighting()(jacobian @ jacobian.T)
    moved = 10**exponent * jacobian[order]
    torch.testing.assert_close(AgreementWeighting()(moved @ moved.T), weights[order])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.__name__)
def test_gramian_tells_the_statistics_that_the_matrix_tells(sampler):
    jacobian = sampler(torch.Generator().manual_seed(1))
    seen = []

    class Spy:
        needs = frozenset({"gramian", "cosine_row_sums"})

        def __call__(self, statistics):
            seen.append(statistics)
            return ga.Mean().weighting(statistics)

    ga.Aggregator(Spy()).aggregate({"a": jacobian[:, :1], "b": jacobian[:, 1:]})
    measured = seen[-1]  # the last where the first was of no use without scaling
    known = from_gramian(jacobian @ jacobian.T)
    for name in ("row_sums", "squared_norms", "gramian"):
        found = getattr(known, name) * known.scale**2
        expected = getattr(measured, name) * measured.scale**2
        size = measured.squared_norms.sum() * measured.scale**2
        assert (found - expected).abs().max() <= 1e-12 * size, name
    # The cosine of a small signal is as exact as the product of two signals of its size.
    cosines = known.cosine_row_sums - measured.cosine_row_sums
    assert cosines.abs().max() <= 1e-9 * len(jacobian)


def test_gramian_is_formed_for_those_alone_who_ask():
    seen = []

    class Spy:
        needs = frozenset()

        def __call__(self, statistics):
            seen.append(statistics.gramian)
            return ga.Mean().weighting(statistics)

    ga.Aggregator(Spy()).aggregate(matrix())
    assert seen == [None]


def test_each_group_of_leaves_has_its_own_gramian():
    seen = []

    class Spy:
        needs = frozenset({"gramian"})

        def __call__(self, statistics):
            seen.append(statistics)
            return ga.Mean().weighting(statistics)

    stack = {"a": matrix(0), "b": 100 * matrix(1)}
    ga.Aggregator(Spy(), scope="leaf").aggregate(stack)
    found = seen[0].gramian * seen[0].scale[:, None, None] ** 2
    expected = torch.stack([leaf @ leaf.T for leaf in stack.values()])
    torch.testing.assert_close(found, expected)


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


def expected_gradients(net, x, y):
    """From our own per-task gradients and the reference's weights."""

    def loss_fn(params, task):
        return ((torch.func.functional_call(net, params, task[0]) - task[1]) ** 2).mean()

    params = {name: p.detach() for name, p in net.named_parameters()}
    gradients = ga.task_gradients(loss_fn, params, (x, y)).gradients
    rows = torch.cat([leaf.flatten(1) for leaf in gradients.values()], 1).double()
    weights = reference.agreement(reference.gram(rows.numpy()))
    return torch.from_numpy(weights.astype(float)) @ rows


def assert_gradients(net, expected, tolerance):
    found = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
    assert (found - expected).norm() <= tolerance * expected.norm()


@each_dtype
@pytest.mark.parametrize("optimized", [False, True], ids=["jacobian", "gramian"])
def test_jac_to_grad_gives_the_update_of_gradient_agreement(dtype, optimized):
    net, (x, y) = network(dtype), data(dtype)
    backward(losses_of(net, x, y))
    weights = jac_to_grad(
        net.parameters(), GradientAgreement(), optimize_gramian_computation=optimized
    )
    assert_gradients(net, expected_gradients(net, x, y), TOLERANCES[dtype])
    assert weights.dtype == dtype
    assert float(weights.abs().sum()) == pytest.approx(1)


@each_dtype
def test_mtl_backward_aggregates_the_trunk_and_leaves_the_heads_their_own(dtype):
    trunk, (x, y) = network(dtype)[:2], data(dtype)
    heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(4)).to(dtype)
    features = trunk(x[0])
    losses = [((head(features) - y[i]) ** 2).mean() for i, head in enumerate(heads)]
    own = [torch.autograd.grad(loss, trunk.parameters(), retain_graph=True) for loss in losses]
    heads_own = [
        torch.autograd.grad(loss, head.parameters(), retain_graph=True)
        for loss, head in zip(losses, heads, strict=True)
    ]
    mtl_backward(losses, features=features)
    jac_to_grad(trunk.parameters(), GradientAgreement())
    rows = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in own]).double()
    weights = reference.agreement(reference.gram(rows.numpy()))
    assert_gradients(trunk, torch.from_numpy(weights.astype(float)) @ rows, TOLERANCES[dtype])
    for head, grads in zip(heads, heads_own, strict=True):
        torch.testing.assert_close([p.grad for p in head.parameters()], list(grads))


@each_dtype
@pytest.mark.parametrize("batch_dim", [0, None])
def test_autogram_engine_and_weighting_give_the_update_of_gradient_agreement(dtype, batch_dim):
    net, (x, y) = network(dtype), data(dtype)
    engine, weighting = Engine(net, batch_dim=batch_dim), AgreementWeighting()
    losses = losses_of(net, x, y)
    losses.backward(weighting(engine.compute_gramian(losses)))
    assert_gradients(net, expected_gradients(net, x, y), TOLERANCES[dtype])


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


@pytest.mark.parametrize("way", ["autojac", "autogram"])
def test_frozen_and_unused_parameters_and_batch_norm_are_as_in_a_backward_pass(way):
    ours, theirs, (x, y) = Spare(), Spare(), data(torch.float64)
    losses = losses_of(theirs, x, y)
    used = [*theirs.norm.parameters(), *theirs.head.parameters()]
    rows = [torch.autograd.grad(loss, used, retain_graph=True) for loss in losses]
    stack = [torch.stack(leaves) for leaves in zip(*rows, strict=True)]
    if way == "autojac":
        backward(losses_of(ours, x, y))
        # TorchJD wants those parameters alone that a loss depends on.
        known = [p for p in ours.parameters() if getattr(p, "jac", None) is not None]
        jac_to_grad(known, GradientAgreement())
    else:
        engine = Engine(ours, batch_dim=None)
        losses = losses_of(ours, x, y)
        losses.backward(AgreementWeighting()(engine.compute_gramian(losses)))
    assert ours.spare.grad is None and ours.body.weight.grad is None
    found = [p.grad for p in (*ours.norm.parameters(), *ours.head.parameters())]
    torch.testing.assert_close(found, ga.GradientAgreement()(stack), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close([*ours.buffers()], [*theirs.buffers()], rtol=0, atol=0)


def test_options_reach_the_weighting():
    jacobian = matrix()
    options = {"similarity": "cosine", "include_self": False, "negative": "clip"}
    found = GradientAgreement(**options)(jacobian)
    torch.testing.assert_close(found, ga.GradientAgreement(**options)(jacobian))
    assert "similarity='cosine', include_self=False" in repr(AgreementWeighting(**options))


def test_weights_are_constants_of_differentiation():
    jacobian = matrix().requires_grad_()
    assert not AgreementWeighting()(jacobian @ jacobian.T).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gramian_gives_weights_of_its_dtype(dtype):
    gramian = (matrix() @ matrix().T).to(dtype)
    weights = AgreementWeighting()(gramian)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, AgreementWeighting()(gramian.double()).to(dtype))


def test_nan_in_the_gramian_reaches_the_weights():
    gramian = matrix() @ matrix().T
    gramian[1] = gramian[:, 1] = torch.nan
    assert AgreementWeighting()(gramian).isnan().all()


@pytest.mark.parametrize("shape", [(3, 4), (3,), (0, 0), (2, 2, 2)])
def test_what_is_no_gramian_is_refused(shape):
    with pytest.raises(ValueError, match=r"a Gramian \[n, n\] .* give jacobian @ jacobian\.T"):
        AgreementWeighting()(torch.ones(shape))


def test_cancelling_scores_raise_where_asked_to():
    jacobian = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    with pytest.raises(ValueError, match="scores that cancel to zero; give degenerate="):
        GradientAgreement(degenerate="raise")(jacobian)
    assert torch.equal(GradientAgreement(degenerate="zero")(jacobian), torch.zeros(2))


def test_unknown_option_is_refused(without_type_checks):
    with pytest.raises(ValueError, match="expected negative to be one of 'keep', 'clip'"):
        GradientAgreement(negative="drop")
