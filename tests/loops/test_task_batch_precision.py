"""TaskBatch and the meta-algorithms with torch.amp: GradScaler and autocast."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import gradagree_opt as ga

each_memory = pytest.mark.parametrize("memory", ["graph", "stream"])
each_form = pytest.mark.parametrize("maml", [False, True], ids=["multi-task", "MAML"])
BAD_BATCH = 2


def network(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)


def draw(seed, dtype=torch.float32, n=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[..., :2].sin() + torch.arange(n).reshape(-1, 1, 1)).to(dtype)


def task_loss(model, params, x, y):
    return mse_loss(functional_call(model, params, (x,)), y)


def add_tasks(batch, model, tasks, maml, scale=lambda loss: loss):
    params = dict(model.named_parameters())
    for x, y in zip(*tasks, strict=True):
        if maml:
            loss = task_loss(model, params, x, y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            pairs = zip(params.items(), grads, strict=True)
            adapted = {name: p - 0.1 * grad for (name, p), grad in pairs}
            batch.add(scale(task_loss(model, adapted, x, y)), adapted=adapted)
        else:
            batch.add(scale(task_loss(model, params, x, y)))


@each_memory
@each_form
def test_grad_scaler_skips_the_bad_step_and_the_others_equal_those_without_it(memory, maml):
    scaled, plain = network(torch.float64), network(torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (scaled, plain)]
    aggregator = ga.GradientAgreement(nonfinite="propagate")
    scaled_batch, plain_batch = (
        ga.TaskBatch(model, aggregator, memory=memory) for model in (scaled, plain)
    )
    for iteration in range(5):
        x, y = draw(iteration, torch.float64)
        if iteration == BAD_BATCH:
            y[1] = float("inf")
            before = copy.deepcopy(scaled.state_dict())
        for optimizer in optimizers:
            optimizer.zero_grad()
        add_tasks(scaled_batch, scaled, (x, y), maml, scaler.scale)
        scaled_batch.backward()
        scaler.step(optimizers[0])
        scaler.update()
        if iteration == BAD_BATCH:
            assert scaler.get_scale() == 2.0**11
            after = scaled.state_dict()
            assert all(torch.equal(before[name], after[name]) for name in before)
            continue
        add_tasks(plain_batch, plain, (x, y), maml)
        plain_batch.backward()
        optimizers[1].step()
        for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def relative_distance(found, expected):
    pairs = zip(found, expected, strict=True)
    apart = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    return apart / torch.cat([b.flatten() for b in expected]).norm()


@each_memory
@each_form
@pytest.mark.parametrize("aggregator", [ga.Mean, ga.GradientAgreement])
def test_update_under_bfloat16_autocast_is_close_to_that_of_float32(memory, maml, aggregator):
    model = network()
    updates = []
    for autocast in (False, True):
        batch = ga.TaskBatch(model, aggregator(), memory=memory)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            add_tasks(batch, model, draw(0), maml)
        result = batch.backward()
        assert all(leaf.dtype == torch.float32 for leaf in result.update.values())
        updates.append([*result.update.values()])
    distance = relative_distance(*reversed(updates))
    assert 0 < distance < 0.02


@each_memory
@each_form
def test_weights_are_not_rounded_where_backward_is_called_under_autocast(memory, maml):
    """The losses have no matrix product, whose backward pass autocast would round."""
    updates = []
    for inside in (False, True):
        w = torch.linspace(-1, 1, 5, requires_grad=True)
        batch = ga.TaskBatch([w], ga.GradientAgreement(), memory=memory)
        for target in (0.3, 0.7, 1.9):
            adapted = w - 0.1 * (w - target)
            loss = (((adapted if maml else w) - target) ** 2).mean()
            batch.add(loss, adapted=[adapted] if maml else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            updates.append([*batch.backward().update.values()])
    assert relative_distance(*updates) < 1e-6


@pytest.mark.parametrize(
    "meta",
    [
        lambda loss_fn: ga.MAML(loss_fn, ga.InnerSGD(0.1, 2)),
        lambda loss_fn: ga.MAML(loss_fn, ga.InnerSGD(0.1, 2), first_order=True),
        lambda loss_fn: ga.MAML(loss_fn, ga.InnerSGD(0.1, 2), signal="gradient"),
        lambda loss_fn: ga.Reptile(loss_fn, ga.InnerSGD(0.1, 2)),
    ],
    ids=["MAML", "FOMAML", "MAML on gradients", "Reptile"],
)
def test_meta_algorithms_run_under_bfloat16_autocast(meta):
    model = network()
    params = {name: p.detach() for name, p in model.named_parameters()}
    algorithm = meta(lambda params, batch: task_loss(model, params, *batch))
    tasks = {"support": draw(0), "query": draw(1)}
    expected = algorithm.step(params, tasks, ga.GradientAgreement())
    with torch.autocast("cpu", torch.bfloat16):
        result = algorithm.step(params, tasks, ga.GradientAgreement())
    assert all(leaf.dtype == torch.float32 for leaf in result.update.values())
    assert 0 < relative_distance([*result.update.values()], [*expected.update.values()]) < 0.05


def test_task_gradients_run_under_bfloat16_autocast():
    model = network()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss_fn(params, batch):
        return task_loss(model, params, *batch)

    expected = ga.aggregate_gradients(loss_fn, params, draw(0), ga.GradientAgreement())
    with torch.autocast("cpu", torch.bfloat16):
        result = ga.aggregate_gradients(loss_fn, params, draw(0), ga.GradientAgreement())
    assert 0 < relative_distance([*result.update.values()], [*expected.update.values()]) < 0.02
    torch.testing.assert_close(result.weights, expected.weights, rtol=0, atol=0.01)


@each_memory
@pytest.mark.parametrize("coarse", ["parameters", "losses"])
def test_a_thousand_tasks_in_half_precision_do_not_stall(memory, coarse):
    # One after the other, equal parts of less than 1/256 of their sum add nothing in bfloat16.
    n, dtype = 1000, torch.bfloat16 if coarse == "parameters" else torch.float32
    w = torch.tensor([1.0], dtype=dtype, requires_grad=True)
    batch = ga.TaskBatch([w], ga.Mean(), memory=memory)
    for _ in range(n):
        adapted = w - 0.5
        batch.add((0.9 * adapted).sum().bfloat16(), adapted=[adapted])
    batch.backward()
    torch.testing.assert_close(w.grad, torch.tensor([0.9], dtype=dtype), rtol=4e-3, atol=0)


@each_memory
@each_form
def test_an_infinite_loss_of_a_finite_gradient_is_a_task_that_is_not_finite(memory, maml):
    def batch_of(nonfinite):
        w = torch.tensor([1.0], requires_grad=True)
        batch = ga.TaskBatch([w], ga.Mean(nonfinite=nonfinite), memory=memory)
        for offset in (0.0, float("inf"), 0.0):
            adapted = w - 0.5
            loss = ((adapted if maml else w) ** 2).sum() + offset
            batch.add(loss, **({"adapted": [adapted]} if maml else {}))
        return w, batch

    w, batch = batch_of("raise")
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[1\]"):
        batch.backward()
    assert w.grad is None
    w, batch = batch_of("drop")
    assert batch.backward().weights.tolist() == [0.5, 0.0, 0.5]
    assert w.grad.tolist() == [1.0 if maml else 2.0]
