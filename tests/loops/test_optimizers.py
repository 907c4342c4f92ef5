"""Optimizers with habits of their own, beside the same steps by hand in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

import gradagree_opt as ga

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
each_aggregator = pytest.mark.parametrize(
    "aggregator", [ga.Mean(), ga.GradientAgreement(), ga.EqualAgreement()], ids=repr
)


class Averaging(torch.optim.SGD):
    """As schedule-free ones: steps in train mode alone, and has the mean iterate in eval mode."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.mean = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.steps, self.training = 1, False

    def _swap(self):
        for held, p in zip(self.mean, self.param_groups[0]["params"], strict=True):
            held.data, p.data = p.data, held.data

    def train(self):
        if not self.training:
            self._swap()
        self.training = True

    def eval(self):
        if self.training:
            self._swap()
        self.training = False

    def step(self):
        assert self.training
        super().step()
        self.steps += 1
        for held, p in zip(self.mean, self.param_groups[0]["params"], strict=True):
            held.lerp_(p.detach(), 1 / self.steps)


class SAM(torch.optim.SGD):
    """Sharpness-aware minimization, in its two steps."""

    @torch.no_grad()
    def first_step(self):
        params = self.param_groups[0]["params"]
        norm = torch.cat([p.grad.flatten() for p in params]).norm()
        self.old = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad * 0.05 / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, old in zip(self.param_groups[0]["params"], self.old, strict=True):
            p.copy_(old)
        self.step()
        self.zero_grad()


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def losses_of(model):
    like = next(model.parameters())
    return ((model(X.to(like)) - Y.to(like)) ** 2).mean(0)


def fill(model, aggregator):
    batch = ga.TaskBatch(model, aggregator)
    for loss in losses_of(model):
        batch.add(loss)
    return batch.backward().losses.mean()


def by_hand(model, aggregator):
    """The ``.grad`` of the aggregation: from a stack, and the mean from the loss that it is of."""
    if isinstance(aggregator, ga.Mean):
        return losses_of(model).mean().backward()
    params, losses = list(model.parameters()), losses_of(model)
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    update = aggregator([torch.stack(leaves) for leaves in zip(*rows, strict=True)])
    for p, each in zip(params, update, strict=True):
        p.grad = each
    return None


def train(model, optimizer, reference, expected):
    """Five steps of the wrapper, and the same by hand."""
    for _ in range(5):
        expected.zero_grad()
        by_hand(reference, optimizer.aggregator)
        expected.step()
        optimizer.zero_grad()
        optimizer.step(losses_of(model))


def check_close(model, reference):
    wanted = [p.float() for p in reference.parameters()]
    torch.testing.assert_close(list(model.parameters()), wanted, rtol=1e-4, atol=1e-5)


@each_aggregator
def test_the_wrapper_has_the_modes_of_the_wrapped_optimizer(model, aggregator):
    reference = copy.deepcopy(model).double()
    expected = Averaging(reference.parameters(), lr=0.1)
    optimizer = ga.TaskOptimizer(Averaging(model.parameters(), lr=0.1), aggregator)
    expected.train()
    optimizer.train()
    train(model, optimizer, reference, expected)
    trained = copy.deepcopy(model)
    for each in (expected, optimizer):
        if hasattr(each, "eval"):  # as loops for any optimizer ask
            each.eval()
    check_close(model, reference)
    assert not torch.equal(model[0].weight, trained[0].weight)


def test_the_wrapper_shows_what_the_wrapped_optimizer_has_and_no_more(model):
    optimizer = ga.TaskOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), ga.Mean())
    optimizer.add_param_group({"params": model[2].parameters()})
    losses = losses_of(model)
    optimizer.step(losses)
    assert len(optimizer.optimizer.param_groups) == 2
    assert all(p.grad is not None for p in model.parameters())
    assert not hasattr(optimizer, "train")
    # By it a GradScaler would leave to the wrapper what only the wrapped one can do.
    fused = ga.TaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, fused=True), ga.Mean())
    assert fused.optimizer._step_supports_amp_scaling
    assert not hasattr(fused, "_step_supports_amp_scaling")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_wrapper_can_be_copied(model, how):
    optimizer = ga.TaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), ga.Mean())
    assert how(optimizer).param_groups[0]["lr"] == 0.5


class Lookahead:
    """Slow weights, as many scripts have them: no Optimizer, and a zero_grad without arguments."""

    def __init__(self, optimizer, k=2):
        self.optimizer, self.k, self.steps = optimizer, k, 0
        self.param_groups = optimizer.param_groups
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.k == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                p.copy_(slow.lerp_(p, 0.5))


@each_aggregator
def test_slow_weights_of_lookahead_are_those_by_hand(model, aggregator):
    reference = copy.deepcopy(model).double()
    expected = Lookahead(torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = ga.TaskOptimizer(Lookahead(sgd), aggregator)
    train(model, optimizer, reference, expected)
    check_close(model, reference)


class Warmup:
    """The optimizer of the annotated transformer, which has no param_groups."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def test_a_wrapper_without_groups_is_refused_with_the_way_that_it_has(model):
    warmup = Warmup(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"found Warmup; .* and fill \.grad by a TaskBatch$"):
        ga.TaskOptimizer(warmup, ga.Mean())


@each_aggregator
def test_sharpness_aware_steps_are_those_by_hand(model, aggregator):
    reference = copy.deepcopy(model).double()
    expected = SAM(reference.parameters(), lr=0.1)
    optimizer = SAM(model.parameters(), lr=0.1)
    for _ in range(3):
        for each, filled in ((expected, by_hand), (optimizer, fill)):
            net = reference if filled is by_hand else model
            filled(net, aggregator)
            each.first_step()
            filled(net, aggregator)
            each.second_step()
    check_close(model, reference)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_on_the_mean_steps_as_without_the_library(model, search):
    reference = copy.deepcopy(model).double()
    for net in (model, reference):
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=5, line_search_fn=search)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            if net is model:
                return fill(net, ga.Mean())
            loss = losses_of(net).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(losses_of(model), losses_of(reference).float(), rtol=1e-3, atol=0)


def test_an_optimizer_with_a_closure_is_refused_with_the_way_that_it_has(model):
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(TypeError, match=r"…\), or leave it unwrapped, and fill \.grad by a TaskBa"):
        ga.TaskOptimizer(lbfgs, ga.Mean())


@each_aggregator
def test_two_optimizers_step_on_one_batch(model, aggregator):
    reference = copy.deepcopy(model).double()
    for net, filled in ((model, fill), (reference, by_hand)):
        first = torch.optim.SGD([p for p in net.parameters() if p.ndim == 2], lr=0.1, momentum=0.9)
        second = torch.optim.Adam([p for p in net.parameters() if p.ndim == 1], lr=0.01)
        for _ in range(3):
            net.zero_grad()
            filled(net, aggregator)
            first.step()
            second.step()
    check_close(model, reference)


@each_aggregator
def test_a_second_wrapper_on_the_same_losses_is_told_of_the_batch_for_both(model, aggregator):
    first, second = (
        ga.TaskOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), aggregator)
        for layer in (model[0], model[2])
    )
    losses = losses_of(model)
    first.step(losses)
    with pytest.raises(ValueError, match="to one TaskBatch where several optimizers step"):
        second.step(losses)
