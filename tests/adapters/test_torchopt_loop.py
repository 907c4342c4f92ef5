"""TorchOpt's Meta-optimizers in its extract_state_dict / recover_state_dict loop."""

import pytest
import torch
from torch import nn

import gradagree_opt as ga
from gradagree_testing.configurations import EQUAL, METHODS, PAPER
from gradagree_testing.memory import saved_bytes

torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")

from gradagree_opt.adapters.torchopt import inner  # noqa: E402

from .torchopt_cases import (  # noqa: E402
    STEPS,
    assert_same,
    batches,
    loss_of,
    naive_step,
    network,
    parameters_of,
    task,
)

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
META_OPTIMIZERS = {
    "MetaSGD": ("sgd", {"momentum": 0.9}),
    "MetaAdam": ("adam", {}),
    "MetaAdamW": ("adamw", {}),
    "MetaRMSProp": ("rmsprop", {}),
    "MetaAdaGrad": ("adagrad", {}),
    "MetaAdaDelta": ("adadelta", {}),
    "MetaRAdam": ("radam", {}),
    "MetaAdaMax": ("adamax", {"eps": 1e-8}),  # the two have different defaults
}

each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])


def meta_loop(net, optimizer, tasks, *, each, loss_fn=None, before_query=lambda net: None):
    """TorchOpt's loop; ``each`` is called with the query loss while the net is adapted."""
    loss_fn = loss_fn or (lambda batch: ((net(batch[0]) - batch[1]) ** 2).mean())
    state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    optimizer_state = torchopt.extract_state_dict(optimizer, by="reference")
    for i in range(len(tasks["query"][0])):
        for _ in range(STEPS):
            optimizer.step(loss_fn(task(tasks["support"], i)))
        before_query(net)
        each(loss_fn(task(tasks["query"], i)))
        torchopt.recover_state_dict(net, state)
        torchopt.recover_state_dict(optimizer, optimizer_state)


def grads_of(net):
    return [p.grad for p in net.parameters()]


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, PAPER) for name in META_OPTIMIZERS), ("MetaSGD", EQUAL), ("MetaAdam", EQUAL)],
    ids=str,
)
@pytest.mark.parametrize("memory", ["graph", "stream"])
@each_dtype
def test_meta_optimizer_loop_equals_the_loop_over_tasks(name, method, memory, dtype):
    functional, options = META_OPTIMIZERS[name]
    net, tasks = network(dtype), batches(dtype=dtype)
    transformation = getattr(torchopt, functional)(lr=0.02, **options)
    signals, gradients = naive_step(
        transformation, loss_of(net), parameters_of(net), tasks, constant=False
    )
    weights = method.weigh_adapted(signals, gradients)
    batch = ga.TaskBatch(net, method.make(), memory=memory)
    optimizer = getattr(torchopt, name)(net, lr=0.02, **options)
    meta_loop(net, optimizer, tasks, each=lambda loss: batch.add(loss, adapted=net))
    result = batch.backward()
    assert_same(grads_of(net), weights @ gradients.double(), method.tolerance(dtype))
    assert_same(result.weights, weights, 10 * method.tolerance(dtype))


def peak_of_loop(memory, n):
    """Most bytes that graphs hold on to while TorchOpt's loop runs."""
    net = network()
    batch, optimizer = ga.TaskBatch(net, ga.Mean(), memory=memory), torchopt.MetaAdam(net, lr=0.02)
    with saved_bytes() as peak:
        meta_loop(net, optimizer, batches(n), each=lambda loss: batch.add(loss, adapted=net))
        batch.backward()
    return peak.most


def test_stream_holds_one_graph_and_graph_holds_all():
    assert peak_of_loop("stream", 8) == peak_of_loop("stream", 2)
    assert peak_of_loop("graph", 8) > 3 * peak_of_loop("graph", 2)


@pytest.mark.parametrize("name", META_OPTIMIZERS)
def test_mean_in_a_meta_optimizer_loop_equals_torchopts_own_backward(name):
    net, tasks = network(), batches()
    batch = ga.TaskBatch(net, ga.Mean())
    optimizer = getattr(torchopt, name)(net, lr=0.02)
    meta_loop(net, optimizer, tasks, each=lambda loss: batch.add(loss, adapted=net))
    batch.backward()
    found = [grad.clone() for grad in grads_of(net)]
    net.zero_grad()
    meta_loop(net, optimizer, tasks, each=lambda loss: (loss / 4).backward())
    assert_same(found, grads_of(net), 1e-12)


@each_dtype
def test_stop_gradient_before_the_query_loss_is_first_order_maml(dtype):
    net, tasks = network(dtype), batches(dtype=dtype)
    maml = ga.MAML(loss_of(net), inner(torchopt.adam(lr=0.02), STEPS), first_order=True)
    expected = maml.step(parameters_of(net), tasks, ga.GradientAgreement())
    batch = ga.TaskBatch(net, ga.GradientAgreement())
    meta_loop(
        net,
        torchopt.MetaAdam(net, lr=0.02),
        tasks,
        each=lambda loss: batch.add(loss, adapted=net),
        before_query=torchopt.stop_gradient,
    )
    batch.backward()
    assert_same(grads_of(net), list(expected.update.values()), TOLERANCES[dtype])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_reptile_form_in_a_meta_optimizer_loop_equals_the_loop_over_tasks(method):
    net, tasks = network(), batches()
    signals, _ = naive_step(
        torchopt.adam(lr=0.02), loss_of(net), parameters_of(net), tasks, constant=True
    )
    batch = ga.TaskBatch(net, method.make())
    optimizer = torchopt.MetaAdam(net, lr=0.02)
    meta_loop(net, optimizer, tasks, each=lambda _: batch.add(adapted=net))
    batch.backward()
    assert_same(grads_of(net), method.combine(signals), 1e-12)


def test_parameter_that_no_loss_uses_keeps_the_gradient_it_has():
    net, tasks = network(), batches()
    net.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    batch = ga.TaskBatch(net, ga.GradientAgreement())
    optimizer = torchopt.MetaAdam(net, lr=0.02)
    meta_loop(net, optimizer, tasks, each=lambda loss: batch.add(loss, adapted=net))
    batch.backward()
    assert net.unused.grad is None
    assert net[0].weight.grad.any()


@pytest.mark.parametrize("memory", ["graph", "stream"])
def test_frozen_body_is_left_alone_where_the_meta_optimizer_has_the_head(memory):
    net, tasks = network(), batches()
    net[0].requires_grad_(False)
    body = {name: p for name, p in net.named_parameters() if not p.requires_grad}
    head = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    maml = ga.MAML(
        lambda params, batch: loss_of(net)(params | body, batch), ga.InnerSGD(0.02, STEPS)
    )
    expected = maml.step(head, tasks, ga.GradientAgreement())
    batch = ga.TaskBatch(net, ga.GradientAgreement(), memory=memory)
    optimizer = torchopt.MetaSGD(net[2], lr=0.02)
    meta_loop(net, optimizer, tasks, each=lambda loss: batch.add(loss, adapted=net))
    batch.backward()
    assert net[0].weight.grad is None
    assert_same(grads_of(net[2]), list(expected.update.values()), 1e-12)


def test_batch_norm_keeps_its_statistics_when_the_loop_detaches_buffers():
    net = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
    tasks, optimizer = batches(), torchopt.MetaSGD(net, lr=0.02)
    batch = ga.TaskBatch(net, ga.Mean())
    meta_loop(net, optimizer, tasks, each=lambda loss: batch.add(loss, adapted=net))
    batch.backward()
    found = [grad.clone() for grad in grads_of(net)]
    assert not net[1].running_mean.any() and net[1].num_batches_tracked == 0
    net.zero_grad()
    meta_loop(net, optimizer, tasks, each=lambda loss: (loss / 4).backward())
    assert_same(found, grads_of(net), 1e-12)


def test_net_that_was_recovered_too_early_is_refused():
    net, tasks = network(), batches()
    batch, losses = ga.TaskBatch(net, ga.GradientAgreement()), []
    meta_loop(net, torchopt.MetaSGD(net, lr=0.02), tasks, each=losses.append)
    with pytest.raises(ValueError, match="before its original parameters are recovered"):
        batch.add(losses[0], adapted=net)


def test_tied_parameters_which_torchopt_unties_are_refused():
    net, tasks = network(), batches()
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())
    net.append(nn.Linear(1, 1).double())
    net[3].bias = net[2].bias
    batch = ga.TaskBatch(net, ga.GradientAgreement())
    optimizer = torchopt.MetaSGD(net, lr=0.02)
    with pytest.raises(ValueError, match="adapted parameters"):
        meta_loop(net, optimizer, tasks, each=lambda loss: batch.add(loss, adapted=net))
