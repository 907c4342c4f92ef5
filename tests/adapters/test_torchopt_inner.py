"""TorchOpt's functional optimizers as inner loops, against loops over one task after the other."""

import pytest
import torch
from torch.utils._pytree import tree_map

import gradagree_opt as ga
from gradagree_testing.configurations import EQUAL, PAPER

torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")

from gradagree_opt.adapters.torchopt import inner  # noqa: E402

from .torchopt_cases import (  # noqa: E402
    OPTIMIZERS,
    STEPS,
    assert_same,
    batches,
    flat,
    loss_of,
    naive_step,
    network,
    parameters_of,
    task,
)

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
each_method = pytest.mark.parametrize(
    ("name", "method"),
    [*((name, PAPER) for name in OPTIMIZERS), ("momentum", EQUAL), ("adam", EQUAL)],
    ids=str,
)
each_order = pytest.mark.parametrize("constant", [False, True], ids=["second", "first"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@each_method
@each_order
@each_dtype
def test_maml_on_any_optimizer_equals_the_loop_over_tasks(name, method, constant, dtype):
    net, tasks = network(dtype), batches(dtype=dtype)
    loss_fn, params = loss_of(net), parameters_of(net)
    maml = ga.MAML(loss_fn, inner(OPTIMIZERS[name](), STEPS), first_order=constant)
    result = maml.step(params, tasks, method.make())
    signals, gradients = naive_step(OPTIMIZERS[name](), loss_fn, params, tasks, constant=constant)
    expected = method.weigh_adapted(signals, gradients) @ gradients.double()
    assert_same(result.update, expected, method.tolerance(dtype))


def by_torch(loss_fn, params, tasks, **options):
    """Displacement of every task under an optimizer of PyTorch's, made anew for each."""
    displacements = []
    for i in range(len(tasks["query"][0])):
        at = {name: p.clone().requires_grad_() for name, p in params.items()}
        optimizer = torch.optim.SGD(at.values(), **options)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_fn(at, task(tasks["support"], i)).backward()
            optimizer.step()
        displacements.append(flat(params) - flat(at))
    return torch.stack(displacements)


DAMPENED = {
    "alone": lambda **options: torchopt.sgd(**options),
    "in a chain": lambda **options: torchopt.chain(
        torchopt.nan_to_num(0.0), torchopt.chain(torchopt.sgd(**options))
    ),
    "masked": lambda lr, **options: torchopt.chain(
        torchopt.transform.masked(
            torchopt.transform.trace(**options), lambda updates: tree_map(lambda _: True, updates)
        ),
        torchopt.sgd(lr),
    ),
}


@pytest.mark.parametrize("form", DAMPENED)
@pytest.mark.parametrize("chunk_size", [None, 3, 1])
def test_dampening_spares_the_first_step_of_every_task_of_every_batch(form, chunk_size):
    net, tasks = network(), batches()
    loss_fn, params = loss_of(net), parameters_of(net)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}
    expected = PAPER.combine(by_torch(loss_fn, params, tasks, **options))
    loop = inner(DAMPENED[form](**options), STEPS)
    for _ in range(2):
        meta = ga.Reptile(loss_fn, loop, chunk_size=chunk_size)
        assert_same(meta.step(params, tasks, PAPER.make()).update, expected, 1e-12)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_parameter_without_axes_keeps_its_dtype(name, dtype):
    def loss_fn(params, x):
        return ((x @ params["w"] + params["b"]) ** 2).mean()

    params = {"w": torch.ones(3, dtype=dtype), "b": torch.tensor(0.5, dtype=dtype)}
    maml = ga.MAML(loss_fn, inner(OPTIMIZERS[name](), STEPS))
    adapted = maml.adapt(params, torch.ones(5, 3, dtype=dtype))
    assert [leaf.dtype for leaf in adapted.values()] == [dtype, dtype]


@each_method
def test_reptile_on_any_optimizer_equals_the_loop_over_tasks(name, method):
    net, tasks = network(), batches()
    loss_fn, params = loss_of(net), parameters_of(net)
    reptile = ga.Reptile(loss_fn, inner(OPTIMIZERS[name](), STEPS))
    signals, _ = naive_step(OPTIMIZERS[name](), loss_fn, params, tasks, constant=True)
    result = reptile.step(params, tasks, method.make())
    assert_same(result.update, method.combine(signals), 1e-12)


ENGINES = {
    "displacement": ["one_backward", "stacked", "streamed"],
    "gradient": ["stacked", "streamed", "matrix_free"],
}


@each_optimizer
@pytest.mark.parametrize("signal", ENGINES)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_every_engine_runs_every_optimizer(name, signal, chunk_size):
    net, tasks = network(), batches()
    first, *others = [
        ga.MAML(
            loss_of(net),
            inner(OPTIMIZERS[name](), STEPS),
            signal=signal,
            engine=engine,
            chunk_size=chunk_size,
        ).step(parameters_of(net), tasks, ga.GradientAgreement())
        for engine in ENGINES[signal]
    ]
    for result in others:
        assert_same(result.update, first.update, 1e-12)


def test_adapt_takes_the_number_of_steps_it_is_given():
    net, tasks = network(), batches()
    maml = ga.MAML(loss_of(net), inner(torchopt.adam(lr=0.02), steps=1))
    longer = ga.MAML(loss_of(net), inner(torchopt.adam(lr=0.02), steps=4))
    params, support = parameters_of(net), task(tasks["support"], 0)
    found = maml.adapt(params, support, steps=4)
    assert_same(found, longer.adapt(params, support), 0)
    assert_same(maml.adapt(params, support, steps=0), params, 0)


def test_support_of_integers_adapts_as_any_other():
    net, (x, y) = network(), batches()["support"]
    labels = (y > y.mean()).long()
    params, loss_fn = parameters_of(net), loss_of(net)
    meta = ga.Reptile(loss_fn, inner(torchopt.adam(lr=0.02), STEPS))
    found = meta.step(params, {"support": (x, labels)}, ga.Mean()).update
    expected = meta.step(params, {"support": (x, labels.double())}, ga.Mean()).update
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize(
    "transformation",
    [
        lambda: torchopt.adam(lr=0.02, use_accelerated_op=True),
        lambda: torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.sgd(lr=0.1)),
    ],
    ids=["accelerated", "clip_grad_norm"],
)
def test_transformation_that_cannot_run_under_vmap_is_refused(transformation):
    net = network()
    maml = ga.MAML(loss_of(net), inner(transformation(), STEPS))
    with pytest.raises(ValueError, match="runs under vmap, found one that does not; leave out"):
        maml.step(parameters_of(net), batches(), ga.Mean())


def test_error_of_the_loss_is_not_taken_for_one_of_the_optimizer():
    def loss_fn(params, batch):
        raise RuntimeError("the loss has a message of its own")

    maml = ga.MAML(loss_fn, inner(torchopt.sgd(lr=0.1), steps=1))
    with pytest.raises(RuntimeError, match="a message of its own"):
        maml.step(torch.ones(4), batches(), ga.Mean())


def test_eps_root_lets_second_order_pass_an_entry_without_gradient():
    def loss_fn(params, batch):
        x, y = batch
        return ((torch.relu(x + params["bias"]) @ params["out"] - y) ** 2).mean()

    bias = torch.tensor([5.0, -100.0], dtype=torch.float64)  # the second unit is dead
    params = {"bias": bias, "out": torch.ones(2, 1, dtype=torch.float64)}
    tasks = batches()
    maml = ga.MAML(loss_fn, inner(torchopt.adam(lr=0.02), STEPS))
    with pytest.raises(ValueError, match="found NaN or inf"):
        maml.step(params, tasks, ga.Mean())
    rooted = torchopt.adam(lr=0.02, eps_root=1e-8)
    update = ga.MAML(loss_fn, inner(rooted, STEPS)).step(params, tasks, ga.Mean()).update
    _, gradients = naive_step(rooted, loss_fn, params, tasks, constant=False)
    assert_same(list(update.values()), gradients.mean(0), 1e-12)


def test_optimizer_that_is_not_functional_is_refused(without_type_checks):
    with pytest.raises(TypeError, match=r"found FuncOptimizer; give what torchopt\.adam"):
        inner(torchopt.FuncOptimizer(torchopt.sgd(lr=0.1)), steps=1)


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="steps to be an integer of 0 or more, found -1"):
        inner(torchopt.sgd(lr=0.1), steps=-1)
    maml = ga.MAML(lambda w, x: ((w - x) ** 2).mean(), inner(torchopt.sgd(lr=0.1), steps=1))
    with pytest.raises(ValueError, match="steps to be an integer of 0 or more, found -1"):
        maml.adapt(torch.tensor(0.0), torch.ones(3), steps=-1)


@pytest.mark.compiled
def test_captured_step_with_an_optimizer_that_has_state_equals_the_eager_one(
    without_code_generation,
):
    net, tasks, aggregator = network(), batches(), ga.GradientAgreement(nonfinite="propagate")
    loss_fn = loss_of(net)

    def step(compile):
        maml = ga.MAML(loss_fn, inner(torchopt.adam(lr=0.02), 2), compile=compile)
        return maml.step(parameters_of(net), tasks, aggregator).update

    assert_same(step(True), step(False), 1e-6)
