"""TorchOpt's three kinds of optimizers as the outer one: on ``.grad``, and on the weighted loss."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import gradagree_opt as ga
from gradagree_testing.configurations import METHODS

torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")

from gradagree_opt.adapters.torchopt import weighted_loss  # noqa: E402 - skipped without

from .torchopt_cases import assert_same  # noqa: E402

OPTIMIZERS = {
    "Adam": lambda parameters: torchopt.Adam(parameters, lr=0.1),
    "SGD": lambda parameters: torchopt.SGD(parameters, lr=0.1, momentum=0.9),
    "RMSProp": lambda parameters: torchopt.RMSProp(parameters, lr=0.1),
}
each_method = pytest.mark.parametrize("method", METHODS, ids=str)
TARGETS = torch.tensor([[1.0, 0.0], [2.0, -1.0], [-1.5, 0.5]], dtype=torch.float64)


def task_losses(w):
    return (w.tanh() - TARGETS).square().sum(1)


def start():
    return torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)


def gradients(w):
    return torch.func.jacrev(task_losses)(w.detach())


def expected_steps(wrap, method, *, steps=4):
    """The optimizer on its own, its gradient made from the method's formula."""
    w = start()
    optimizer = wrap([w])
    for _ in range(steps):
        w.grad = method.combine(gradients(w))
        optimizer.step()
    return w


@each_method
@pytest.mark.parametrize("wrap", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_on_task_losses_takes_the_steps_of_the_one_on_their_aggregation(wrap, method):
    w = start()
    optimizer = ga.TaskOptimizer(wrap([w]), method.make())
    for _ in range(4):
        optimizer.zero_grad()
        stack = gradients(w)
        result = optimizer.step(task_losses(w))
    assert_same(w, expected_steps(wrap, method), 1e-12)
    assert_same(result.update, method.combine(stack), 1e-12)


@each_method
def test_functional_optimizer_steps_as_the_one_that_holds_its_parameters(method):
    expected = expected_steps(OPTIMIZERS["Adam"], method)
    w = before = start()
    optimizer = torchopt.FuncOptimizer(torchopt.adam(lr=0.1))
    for _ in range(4):
        loss, _ = weighted_loss(task_losses(w), (w,), method.make())
        (w,) = optimizer.step(loss, (w,))
    assert_same(w, expected, 1e-12)
    assert torch.equal(before, start())


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(start().detach())


@each_method
def test_meta_optimizer_steps_as_the_one_that_holds_its_parameters(method):
    expected = expected_steps(OPTIMIZERS["Adam"], method)
    net = Weight()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    for _ in range(4):
        loss, _ = weighted_loss(task_losses(net.w), net, method.make())
        optimizer.step(loss)
    assert_same(net.w, expected, 1e-12)


@each_method
def test_step_of_a_meta_optimizer_is_differentiable_with_the_weights_constant(method):
    net = Weight()
    w = net.w
    loss, _ = weighted_loss(task_losses(w), net, method.make())
    torchopt.MetaSGD(net, lr=0.1).step(loss)
    (found,) = torch.autograd.grad(net.w.square().sum(), w)
    weights = method.weigh(gradients(w))
    moved = lambda v: v - 0.1 * torch.func.grad(lambda u: weights @ task_losses(u))(v)  # noqa: E731
    expected = torch.func.grad(lambda v: moved(v).square().sum())(start().detach())
    assert_same(found, expected, 1e-12)


class Counted(torch.autograd.Function):
    """The identity; a backward pass goes through it once."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.passes += 1
        return grad


def agreement_by_hand(stack):
    scores = stack @ stack.sum(0)
    return scores @ stack / scores.abs().sum()


@pytest.mark.parametrize("n", [6, 12])
@pytest.mark.parametrize(
    ("make", "by_hand", "passes"),
    [
        (ga.Mean, lambda stack: stack.mean(0), lambda n: 2),  # of the update, and of the step
        (ga.Sum, lambda stack: stack.sum(0), lambda n: 2),
        (ga.GradientAgreement, agreement_by_hand, lambda n: 3),
        (ga.EqualAgreement, METHODS[1].combine, lambda n: n + 1),
    ],
    ids=["mean", "sum", "agreement", "equal"],
)
def test_what_reads_row_sums_alone_takes_no_pass_for_each_task(make, by_hand, passes, n):
    targets = TARGETS.repeat(4, 1)[:n] * torch.linspace(1, 2, n, dtype=torch.float64).unsqueeze(1)

    def losses(w):
        return (w.tanh() - targets).square().sum(1)

    w = start()
    Counted.passes = 0
    loss, result = weighted_loss(losses(Counted.apply(w)), (w,), make())
    (found,) = functional().step(loss, (w,))
    assert Counted.passes == passes(n)
    update = by_hand(torch.func.jacrev(losses)(w.detach()))
    assert_same(found, w.detach() - 0.1 * update, 1e-12)
    assert_same(result.update, {"0": update}, 1e-12)
    assert_same(result.losses, losses(w.detach()), 1e-12)


def test_update_goes_by_the_names_of_a_module_and_its_losses_keep_their_graphs():
    net = Weight()
    losses = task_losses(net.w)
    _, result = weighted_loss(losses, net, ga.Mean())
    (expected,) = torch.autograd.grad(losses.mean(), net.w)
    assert_same(result.update["w"], expected, 1e-12)
    assert net.w.grad is None


def test_dropped_task_stays_out_of_the_loss_that_is_stepped_on():
    def losses(w):
        return [*task_losses(w), (w[0] - w[0]).sqrt()]  # the last gradient is NaN

    aggregator = ga.GradientAgreement(nonfinite="drop")
    w = start()
    found, expected = (
        functional().step(weighted_loss(each, (w,), aggregator).loss, (w,))
        for each in (losses(w), task_losses(w))
    )
    assert_same(found, expected, 1e-12)


def functional():
    return torchopt.FuncOptimizer(torchopt.sgd(lr=0.1))


@pytest.mark.parametrize(
    "make", [functional, lambda: torchopt.MetaSGD(Weight(), lr=0.1)], ids=["functional", "meta"]
)
def test_task_optimizer_sends_what_steps_on_a_loss_to_the_weighted_loss(make):
    optimizer = make()
    message = (
        f"steps on .grad, found {type(optimizer).__name__}, which steps on a loss; .*weighted_loss"
    )
    with pytest.raises(TypeError, match=message):
        ga.TaskOptimizer(optimizer, ga.Mean())


def test_one_loss_cannot_hold_weights_by_parameter():
    w = start()
    with pytest.raises(ValueError, match=r"scope 'global', found 'leaf'.*take.*torchopt\.Adam"):
        weighted_loss(task_losses(w), (w,), ga.GradientAgreement(scope="leaf"))


def test_one_loss_cannot_hold_the_tasks_of_several_ranks():
    w = start()
    with pytest.raises(ValueError, match=r"of one process, found one of several ranks, .*; take"):
        weighted_loss(task_losses(w), (w,), ga.distributed(ga.Mean()))


def test_what_is_no_aggregator_is_refused(without_type_checks):
    w = start()
    with pytest.raises(TypeError, match="found the class Mean; call it"):
        weighted_loss(task_losses(w), (w,), ga.Mean)


def test_a_frozen_parameter_that_torchopt_would_differentiate_by_is_named():
    message = r"found '{}', of shape \[3\], frozen, by which TorchOpt would differentiate"
    w, frozen = start(), torch.ones(3)
    with pytest.raises(ValueError, match=message.format("1")):
        weighted_loss(task_losses(w), (w, frozen), ga.Mean())
    net = Weight()
    net.register_parameter("frozen", nn.Parameter(frozen, requires_grad=False))
    with pytest.raises(ValueError, match=message.format("frozen")):
        weighted_loss(task_losses(net.w), net, ga.Mean())


def test_loss_of_other_parameters_is_named_by_its_task():
    w = start()
    with pytest.raises(ValueError, match="no gradient for task 1; compute it from"):
        weighted_loss([w.sum(), torch.ones(())], (w,), ga.Mean())
    with pytest.raises(ValueError, match="found one for task 1 that depends on none of them"):
        weighted_loss([w.sum(), start().sum()], (w,), ga.Mean())
    with pytest.raises(ValueError, match=r"a scalar loss, found shape \[2\] for task 0"):
        weighted_loss([w], (w,), ga.Mean())
    with pytest.raises(ValueError, match="expected at least one task, found no losses"):
        weighted_loss([], (w,), ga.Mean())


def test_state_of_torchopts_optimizer_is_saved_and_loaded():
    w = start()
    optimizer = ga.TaskOptimizer(torchopt.Adam([w], lr=0.1), ga.Mean())
    optimizer.step(task_losses(w))
    other = ga.TaskOptimizer(torchopt.Adam([w], lr=0.1), ga.Mean())
    other.load_state_dict(optimizer.state_dict())
    assert_same(
        [leaf.double() for leaf in tree_leaves(other.state_dict())],
        [leaf.double() for leaf in tree_leaves(optimizer.state_dict())],
        0,
    )
