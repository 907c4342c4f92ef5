"""What plain.train refuses, in one sentence each, and what it leaves behind."""

import pytest
import torch
from gradagree_opt.adapters import plain
from torch.utils._pytree import tree_leaves

import gradagree_opt as ga

from .plain_cases import INNER, META, each_meta, network, run, sines


@each_meta
def test_a_frozen_parameter_is_named(meta):
    params = network(0)
    params["bias1"].requires_grad_(False)
    with pytest.raises(ValueError, match="found 'bias1' frozen; keep it out of params and let"):
        run(meta, params)
    assert torch.equal(params["bias1"], network(0)["bias1"])


@each_meta
def test_a_tied_parameter_is_to_be_given_once(meta):
    params = network(0)
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.05)
    params["tied"] = params["bias1"]
    with pytest.raises(ValueError, match="every parameter once, found 'bias1' again as 'tied'"):
        plain.train(meta, params, sines, optimizer, ga.GradientAgreement(), iterations=3)
    assert torch.equal(params["bias1"], network(0)["bias1"])


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("make", [ga.MAML, ga.Reptile])
def test_running_statistics_are_refused_with_what_to_do(make, chunk_size):
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    def loss_of_net(params, batch):
        return ((torch.func.functional_call(net, params, (batch[0],)) - batch[1]) ** 2).mean()

    meta, params = make(loss_of_net, INNER, chunk_size=chunk_size), dict(net.named_parameters())
    message = r"call torch\.func\.replace_all_batch_norm_modules_\(model\), or"
    with pytest.raises(ValueError, match=message) as caught:
        run(meta, params)
    assert "\n" not in str(caught.value)
    assert not net[1].running_mean.any() and net[1].num_batches_tracked == 0

    torch.func.replace_all_batch_norm_modules_(net)
    before = net[2].weight.detach().clone()
    run(meta, params)
    assert not torch.equal(net[2].weight, before)


@pytest.mark.parametrize(
    ("place", "wrong", "found"),
    [
        (1, torch.nn.Linear(1, 1), r"found Linear; give dict\(module\.named_parameters\(\)\)"),
        (2, {"support": (), "query": ()}, "to its tasks, found dict; give lambda iteration: tasks"),
        (3, torch.optim.LBFGS([torch.ones(1)]), r"found LBFGS, whose step\(\) needs its closure"),
        (
            3,
            ga.TaskOptimizer(torch.optim.SGD([torch.ones(1)]), ga.Mean()),
            r"found TaskOptimizer, whose step\(\) needs its losses",
        ),
    ],
    ids=["module", "tasks", "LBFGS", "TaskOptimizer"],
)
def test_what_is_of_another_kind_is_refused(place, wrong, found, without_type_checks):
    w = torch.ones(1, requires_grad=True)
    maml = ga.MAML(lambda w, x: ((w - x) ** 2).mean(), ga.InnerSGD(lr=0.1, steps=1))
    optimizer = torch.optim.SGD([w], lr=0.1)
    arguments = [maml, w, lambda _: {"support": w[None], "query": w[None]}, optimizer, ga.Mean()]
    arguments[place] = wrong
    with pytest.raises(TypeError, match=found):
        plain.train(*arguments, iterations=1)
    assert w.item() == 1


def test_an_optimizer_over_other_tensors_is_refused():
    params = network(0)
    copies = [p.detach().clone().requires_grad_() for p in params.values()]
    for held in (copies, list(params.values())[:3]):
        optimizer = torch.optim.SGD(held, lr=0.1)
        with pytest.raises(ValueError, match="expected an optimizer over the leaves of params"):
            plain.train(META["MAML"], params, sines, optimizer, ga.Mean(), iterations=1)
    assert all(torch.equal(p, network(0)[key]) for key, p in params.items())


def test_a_refused_batch_leaves_the_parameters_of_the_last_good_step():
    params, expected = network(0), network(0)

    def source(iteration):
        tasks = sines(iteration)
        if iteration == 2:
            tasks["support"][1][3] = float("nan")
        return tasks

    plain.train(
        META["Reptile"],
        expected,
        sines,
        torch.optim.SGD(expected.values(), lr=0.1),
        ga.GradientAgreement(),
        iterations=2,
    )
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[3\]"):
        plain.train(
            META["Reptile"], params, source, optimizer, ga.GradientAgreement(), iterations=5
        )
    assert all(torch.equal(params[key], expected[key]) for key in params)
