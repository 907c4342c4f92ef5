"""``adapt``: what it is given wrongly is named, and what its errors advise has been tried."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import gradagree_opt as ga

from .loops import ALGORITHMS

RATE, STEPS = 0.1, 2
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


class Square(torch.autograd.Function):
    """Of the classic kind, which torch.func does not run."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class Squared(nn.Linear):
    def forward(self, x):
        return Square.apply(super().forward(x))


class Checkpointed(nn.Linear):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Packed(nn.RNN):
    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [3] * len(x), batch_first=True)
        return super().forward(packed)[1][0]


def seeded(make):
    torch.manual_seed(0)
    return make()


MODELS = {
    "classic": (lambda: Squared(3, 2), (6, 3)),
    "checkpoint": (lambda: Checkpointed(3, 2), (6, 3)),
    "packed": (lambda: Packed(3, 2, batch_first=True), (6, 4, 3)),
}


def loss_of(module, loss=mse_loss):
    def loss_fn(params, batch):
        return loss(functional_call(module, params, (batch[0],)), batch[1])

    return loss_fn


def given(algorithm, module):
    """The (meta-)parameters of an algorithm."""
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    rates = {name: torch.full_like(p, RATE) for name, p in params.items()}
    return {"params": params, "lr": rates} if algorithm.learns_rates else params


def by_hand(loss_fn, params, support):
    """An inner loop by torch.autograd.grad."""
    for _ in range(STEPS):
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(loss_fn(params, support), list(params.values()))
        pairs = zip(params.items(), grads, strict=True)
        params = {name: (p - RATE * g).detach() for (name, p), g in pairs}
    return params


def refused(meta, params, support, match, error=ValueError):
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        meta.adapt(params, support)
    assert "\n" not in str(caught.value)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@each_algorithm
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_torch_func_does_not_run_wants_a_loop_of_ones_own(algorithm, kind):
    make, shape = MODELS[kind]
    module = seeded(make)
    loss_fn, support = loss_of(module), (torch.randn(shape), torch.randn(6, 2))
    meta = algorithm.build(loss_fn, RATE, STEPS)
    match = r"expected a model that adapt\(\) can run, found: .*; take an inner loop of your own"
    refused(meta, given(algorithm, module), support, match, RuntimeError)
    params = dict(module.named_parameters())
    losses = [loss_fn(p, support).item() for p in (params, by_hand(loss_fn, params, support))]
    assert losses[1] < losses[0]  # what it advises adapts


STACKS = {
    "images": (lambda: nn.Conv2d(1, 2, 3), (4, 6, 1, 5, 5), (4, 6, 2, 3, 3)),
    "sequences": (lambda: nn.Conv1d(1, 2, 3), (4, 6, 1, 5), (4, 6, 2, 3)),
    "labels": (lambda: nn.Linear(3, 2), (4, 6, 3), None),
}


@each_algorithm
@pytest.mark.parametrize("kind", STACKS)
def test_all_tasks_in_the_place_of_one(algorithm, kind):
    make, shape, target = STACKS[kind]
    module = seeded(make)
    y = torch.randint(2, (4, 6)) if target is None else torch.randn(target)
    loss_fn = loss_of(module, cross_entropy if target is None else mse_loss)
    meta, params = algorithm.build(loss_fn, RATE, STEPS), given(algorithm, module)
    support = (torch.randn(shape), y)
    match = r"expected the support set of one task, found .*; give one task, without the task axis"
    refused(meta, params, support, match)
    one = tree_map(lambda leaf: leaf[0], support)  # what the message advises
    found = meta.adapt(params, one)
    expected = by_hand(loss_fn, dict(module.named_parameters()), one)
    torch.testing.assert_close(found, expected)


@each_algorithm
@pytest.mark.parametrize("keys", ["positions", "names"])
def test_a_whole_task_in_the_place_of_its_support_set(algorithm, keys):
    module = seeded(lambda: nn.Linear(3, 2))
    batch = (torch.randn(6, 3), torch.randn(6, 2))
    at = (0, 1) if keys == "positions" else ("x", "y")
    batch = batch if keys == "positions" else dict(zip(at, batch, strict=True))

    def loss_fn(params, batch):
        return mse_loss(functional_call(module, params, (batch[at[0]],)), batch[at[1]])

    meta, params = algorithm.build(loss_fn, RATE, STEPS), given(algorithm, module)
    task = {"support": batch, "query": batch}
    refused(meta, params, task, r"; give task\['support'\]$")
    found = meta.adapt(params, task["support"])
    torch.testing.assert_close(found, by_hand(loss_fn, dict(module.named_parameters()), batch))


@each_algorithm
def test_integer_parameters(algorithm):
    module = seeded(lambda: nn.Linear(3, 2))
    params = given(algorithm, module)
    inner = params["params"] if algorithm.learns_rates else params
    inner["bias"] = torch.arange(2)
    meta = algorithm.build(loss_of(module), RATE, STEPS)
    match = r"expected floating-point parameters, found torch.int64 in '(params\.)?bias'"
    refused(meta, params, (torch.randn(6, 3), torch.randn(6, 2)), match, TypeError)


WRONG = {
    "integers": (torch.ones(6, 3, dtype=torch.long), torch.randn(6, 2)),
    "another size": (torch.randn(6, 4), torch.randn(6, 2)),
    "arrays": (np.ones((6, 3)), torch.randn(6, 2)),
}


@each_algorithm
@pytest.mark.parametrize("support", WRONG.values(), ids=WRONG)
def test_what_no_advice_helps_is_the_loss_functions_own_error(algorithm, support):
    module = seeded(lambda: nn.Linear(3, 2))
    loss_fn = loss_of(module)
    with pytest.raises((RuntimeError, TypeError)) as own:
        loss_fn(dict(module.named_parameters()), support)
    with pytest.raises(type(own.value)) as found:
        algorithm.build(loss_fn, RATE, STEPS).adapt(given(algorithm, module), support)
    assert str(found.value) == str(own.value)


@each_algorithm
def test_a_task_of_several_examples_is_not_taken_for_all_tasks(algorithm):
    """The first example alone would be taken: the loss function is one of a single example."""
    module = seeded(lambda: nn.Linear(3, 1))

    def loss_fn(params, batch):
        x, y = batch
        return (params["weight"].squeeze(0).dot(x) + params["bias"] - y).square().sum()

    support = (torch.randn(6, 3), torch.randn(6))
    loss_fn(dict(module.named_parameters()), tree_map(lambda leaf: leaf[0], support))
    with pytest.raises(RuntimeError, match="1D tensors expected"):
        algorithm.build(loss_fn, RATE, STEPS).adapt(given(algorithm, module), support)


NORMS = {
    "batch": lambda: nn.BatchNorm1d(3),
    "instance": lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
}


@each_algorithm
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_changed_buffers_are_refused(algorithm, norm):
    module = seeded(lambda: nn.Sequential(norm(), nn.Flatten(), nn.Linear(12, 2)))
    meta = algorithm.build(loss_of(module), RATE, STEPS)
    before = [b.clone() for b in module.buffers()]
    support = (torch.randn(6, 3, 4), torch.randn(6, 2))
    refused(meta, given(algorithm, module), support, "expected a model that changes no buffer")
    assert all(map(torch.equal, before, module.buffers()))


@each_algorithm
def test_a_step_whose_model_changes_a_buffer_has_one_sentence(algorithm):
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2), n_power_iterations=1)
    tasks = {name: (torch.randn(4, 6, 3), torch.randn(4, 6, 2)) for name in ("support", "query")}
    meta = algorithm.build(loss_of(linear), RATE, STEPS)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        meta.step(given(algorithm, linear), tasks, ga.GradientAgreement())
    assert str(caught.value).count("expected") == 1


@each_algorithm
def test_an_error_that_does_not_come_again_is_not_laid_on_the_support_set(algorithm):
    module, calls = seeded(lambda: nn.Linear(3, 2)), []
    plain = loss_of(module)

    def once(params, batch):
        if not calls:
            calls.append(0)
            raise ValueError("the file is locked")
        return plain(params, batch)

    meta, params = algorithm.build(once, RATE, STEPS), given(algorithm, module)
    support = (torch.randn(4, 6, 3), torch.randn(4, 6, 2))  # a linear layer takes them as they are
    with pytest.raises(ValueError, match="the file is locked"):
        meta.adapt(params, support)


@each_algorithm
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_integers_that_the_loss_takes_as_floats(algorithm, dtype):
    module = seeded(lambda: nn.Linear(3, 2))
    support = tuple(torch.arange(6 * size).reshape(6, size).to(dtype) for size in (3, 2))
    meta, params = algorithm.build(loss_of(module), RATE / 100, STEPS), given(algorithm, module)
    refused(meta, params, support, r"found what the loss .*; give floating-point tensors, as supp")
    meta.adapt(params, tree_map(lambda leaf: leaf.float(), support))  # what the message advises
