"""Losses of one graph, aggregated by few passes over it, against loops over their gradients."""

import pytest
import torch
from torch import nn

import gradagree_opt as ga
from gradagree_opt.engines import candidates
from gradagree_testing import reference

from .one_graph import N, Net, assert_agrees, backward, flat_grad, naive

ROW_SUMS = {
    "paper": {},
    "clip": {"negative": "clip"},
    "softmax": {"normalization": "softmax", "temperature": 0.5},
}
UNREAD = {
    "mean": ga.Mean,
    "sum": ga.Sum,
    "mean of the sum's length": lambda **options: ga.Mean(match_norm=ga.Sum(), **options),
    "random": lambda **options: ga.RandomWeights(torch.Generator().manual_seed(3), **options),
}


class Through(torch.autograd.Function):
    """The identity, with a backward pass that is counted."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Through.passes += 1
        return grad.clone()


class Once(Through):
    """One that says that it is differentiable once."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad.clone()


class Cut(Through):
    """One as of a kernel of somebody's own, which says nothing."""

    @staticmethod
    def backward(ctx, grad):
        return grad.detach().clone()


@pytest.fixture(params=["held", "streamed"])
def without_second_derivatives(request, monkeypatch):
    """What is done there, where the gradients are small and where they are large."""
    if request.param == "streamed":
        monkeypatch.setattr(candidates, "STACK_BYTES", 0)


@pytest.mark.parametrize("options", ROW_SUMS.values(), ids=ROW_SUMS)
@pytest.mark.parametrize("nonfinite", ["raise", "drop", "propagate"])
@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_agreement_is_that_of_the_gradients(options, nonfinite, n):
    module = Net(n)
    result = backward(module, ga.GradientAgreement(nonfinite=nonfinite, **options))
    assert_agrees(module, result, options)


@pytest.mark.parametrize("make", UNREAD.values(), ids=UNREAD)
@pytest.mark.parametrize("nonfinite", ["raise", "drop", "propagate"])
def test_weights_that_read_no_gradient_are_applied_to_the_loss(make, nonfinite):
    module = Net()
    result = backward(module, make(nonfinite=nonfinite))
    expected = result.weights @ naive(module)
    torch.testing.assert_close(flat_grad(module), expected, rtol=1e-12, atol=1e-14)
    total = torch.autograd.grad(
        sum(w * loss for w, loss in zip(result.weights, module.losses(), strict=True)),
        [*module.parameters()],
    )
    torch.testing.assert_close([*result.update.values()], [*total], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("aggregator", "passes"),
    [
        (ga.Mean(), 1),
        (ga.Sum(), 1),
        (ga.Mean(match_norm=ga.Sum()), 2),
        (ga.RandomWeights(torch.Generator().manual_seed(0)), 1),
        (ga.GradientAgreement(), 2),  # and one through the first
        (ga.GradientAgreement(match_norm="mean"), 3),
        (ga.GradientAgreement(nonfinite="propagate"), 2),
    ],
    ids=["mean", "sum", "mean as long as the sum", "random", "agreement", "matched", "propagate"],
)
@pytest.mark.parametrize("n", [4, 16])
def test_a_shared_trunk_is_gone_back_through_as_often_whatever_the_number_of_tasks(
    aggregator, passes, n
):
    module = Net(n, Through.apply)
    Through.passes = 0
    result = backward(module, aggregator)
    assert Through.passes == passes
    assert result.diagnostics.cancellation.isnan()


@pytest.mark.parametrize("options", [{"match_norm": "mean"}, {"match_norm": ga.Sum()}])
def test_the_norm_of_another_method_is_matched(options):
    module = Net()
    result = backward(module, ga.GradientAgreement(**options))
    stack = naive(module)
    direction = torch.from_numpy(reference.agreement(reference.gram(stack.numpy()))) @ stack
    target = stack.sum(0) if isinstance(options["match_norm"], ga.Sum) else stack.mean(0)
    expected = direction * target.norm() / direction.norm()
    torch.testing.assert_close(flat_grad(module), expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(result.weights @ stack, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("function", [Once, Cut])
@pytest.mark.usefixtures("without_second_derivatives")
def test_a_graph_that_cannot_be_differentiated_twice_gives_the_same(function):
    module = Net(middle=function.apply)
    assert_agrees(module, backward(module, ga.GradientAgreement()), {})


@pytest.mark.usefixtures("without_second_derivatives")
def test_a_hook_that_cuts_the_graph_of_the_backward_pass_does_not_change_the_weights():
    def middle(x):
        x.register_hook(lambda grad: grad.detach().clone())
        return 1 * x

    module = Net(middle=middle)
    assert_agrees(module, backward(module, ga.GradientAgreement()), {})


@pytest.mark.usefixtures("without_second_derivatives")
@pytest.mark.parametrize(("n", "dtype"), [(2, torch.float64), (50, torch.bfloat16)])
def test_few_tasks_and_half_precision_give_the_weights_of_the_gradients(n, dtype):
    module = Net(n, dtype=dtype)
    result = backward(module, ga.GradientAgreement())
    stack = naive(module)
    weights = torch.from_numpy(reference.agreement(reference.gram(stack.numpy())).astype(float))
    torch.testing.assert_close(result.weights.double(), weights, rtol=1e-3, atol=1e-6)
    expected = weights @ stack
    assert (flat_grad(module) - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("aggregator", [ga.GradientAgreement, ga.Mean])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_scale_of_the_losses_does_not_matter(aggregator, scale):
    module = Net(dtype=torch.float32)
    result = backward(module, aggregator(), scale)
    plain = Net(dtype=torch.float64)
    expected = backward(plain, aggregator())
    torch.testing.assert_close(result.weights.double(), expected.weights, rtol=1e-4, atol=1e-6)
    found = flat_grad(module) / scale
    assert (found - flat_grad(plain)).norm() < 1e-5 * flat_grad(plain).norm()
    norm = result.diagnostics.update_norm.double() / scale
    torch.testing.assert_close(norm, flat_grad(plain).norm(), rtol=1e-5, atol=0)


def bad(w, task, n):
    """Losses of one graph, of which one is finite with a gradient that is not."""
    shared = 2 * w
    losses = [(shared - i).square().sum() for i in range(n)]
    losses[task] = losses[task] + (shared - shared.detach()).sqrt().sum()
    return losses


@pytest.mark.parametrize("before", [None, 2.0])
@pytest.mark.parametrize("aggregator", [ga.Mean, ga.GradientAgreement])
@pytest.mark.usefixtures("without_second_derivatives")
def test_a_gradient_that_is_not_finite(aggregator, before):
    def start():
        w = torch.ones(3, requires_grad=True)
        w.grad = None if before is None else torch.full((3,), before)
        return w

    def fill(w, losses, nonfinite):
        batch = ga.TaskBatch([w], aggregator(nonfinite=nonfinite))
        for loss in losses:
            batch.add(loss)
        return batch.backward()

    w = start()
    named = r"in tasks \[2\]" if aggregator is ga.GradientAgreement else "NaN or inf"
    with pytest.raises(ValueError, match=named):
        fill(w, bad(w, 2, N), "raise")
    assert w.grad is None if before is None else w.grad.eq(before).all()

    w, without = start(), start()
    result = fill(w, bad(w, 2, N), "drop")
    good = [loss for i, loss in enumerate(bad(without, 2, N)) if i != 2]
    fill(without, good, "drop")
    torch.testing.assert_close(w.grad, without.grad)
    assert result.weights[2] == 0

    w = start()
    fill(w, bad(w, 2, N), "propagate")
    assert not w.grad.isfinite().any()


@pytest.mark.parametrize("nonfinite", ["raise", "propagate"])
@pytest.mark.usefixtures("without_second_derivatives")
def test_tasks_that_cancel_take_the_fallback(nonfinite):
    def losses(w):
        shared = torch.tanh(w @ torch.linspace(0.3, 1.1, 12).reshape(3, 4))
        return [shared[0], shared[1], -shared[0] / 3, -shared[0] / 1.5, -shared[1]]

    def fill(degenerate):
        w = torch.tensor([0.3, -0.2, 0.7], requires_grad=True)
        options = {"degenerate": degenerate, "nonfinite": nonfinite}
        batch = ga.TaskBatch([w], ga.GradientAgreement(**options))
        for loss in losses(w):
            batch.add(loss)
        return w, batch

    for degenerate, weight in (("uniform", 0.2), ("zero", 0.0)):
        w, batch = fill(degenerate)
        result = batch.backward()
        assert result.diagnostics.degenerate
        torch.testing.assert_close(result.weights, torch.full((N,), weight))
        assert w.grad.abs().max() < 1e-6
    w, batch = fill("raise")
    with pytest.raises(ValueError, match="scores that cancel"):
        batch.backward()
    assert w.grad is None


def test_grads_of_others_are_left_alone_and_unused_parameters_without_one():
    module, x = Net(), torch.ones(3, requires_grad=True, dtype=torch.float64)
    head = nn.Linear(2, 2).double()
    for aggregator in (ga.Mean(), ga.GradientAgreement()):
        module.zero_grad()
        batch = ga.TaskBatch([*module.outside.parameters(), *head.parameters()], aggregator)
        for loss in module.losses():
            batch.add(loss + x.sum() * loss)
        result = batch.backward()
        assert x.grad is None and module.inside.weight.grad is None and head.weight.grad is None
        assert module.outside.weight.grad is not None
        assert [*result.update] == ["0", "1", "2", "3"] and result.update["2"].eq(0).all()


def test_gradients_that_are_zero_give_a_zero_update():
    w = torch.ones(3, requires_grad=True)
    batch = ga.TaskBatch([w], ga.GradientAgreement())
    for loss in torch.floor(2 * w).unbind():
        batch.add(loss)
    result = batch.backward()
    assert w.grad.tolist() == [0, 0, 0] and result.diagnostics.degenerate


def test_a_sparse_embedding_gives_a_dense_update():
    for aggregator in (ga.Mean(), ga.GradientAgreement()):
        sparse, dense = (nn.Embedding(5, 2, sparse=kind) for kind in (True, False))
        dense.load_state_dict(sparse.state_dict())
        for module in (sparse, dense):
            batch = ga.TaskBatch(module, aggregator)
            for loss in module(torch.tensor([0, 1, 1, 3])).square().sum(1).unbind():
                batch.add(loss)
            batch.backward()
        torch.testing.assert_close(sparse.weight.grad, dense.weight.grad)


@torch.no_grad()
def test_backward_may_be_called_where_no_graph_is_made():
    module = Net()
    with torch.enable_grad():
        losses = module.losses()
    batch = ga.TaskBatch(module, ga.GradientAgreement())
    for loss in losses:
        batch.add(loss)
    result = batch.backward()
    with torch.enable_grad():
        assert_agrees(module, result, {})
