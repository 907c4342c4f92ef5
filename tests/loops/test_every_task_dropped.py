"""nonfinite="drop" with every task bad: no step of weight decay alone, but one sentence."""

import pytest
import torch
from gradagree_opt.adapters import plain
from torch import nn

import gradagree_opt as ga

NAN = float("nan")
X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
DROP = ga.GradientAgreement(nonfinite="drop")


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def adam(module):
    return torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)


def losses(module, factors):
    return [factor * module(x).square().sum() for x, factor in zip(X, factors, strict=True)]


def by_task_batch(module, factors, memory="graph"):
    optimizer = adam(module)
    batch = ga.TaskBatch(module, DROP, memory=memory)
    for loss in losses(module, factors):
        batch.add(loss)
    batch.backward()
    optimizer.step()


def by_task_optimizer(module, factors):
    ga.TaskOptimizer(adam(module), DROP).step(losses(module, factors))


def by_torchopt(module, factors):
    torchopt = pytest.importorskip("torchopt")
    from gradagree_opt.adapters.torchopt import weighted_loss

    torchopt.MetaSGD(module, lr=0.1).step(weighted_loss(losses(module, factors), module, DROP).loss)


def by_plain(module, factors):
    params = dict(module.named_parameters())
    tasks = (X.unsqueeze(1), torch.tensor(factors))

    def loss_fn(params, batch):
        return (torch.func.functional_call(module, params, (batch[0],)).square() * batch[1]).sum()

    sets = {"support": tasks, "query": tasks}
    maml = ga.MAML(loss_fn, ga.InnerSGD(0.01, 1))
    plain.train(maml, params, lambda _: sets, adam(module), DROP, iterations=1)


def by_learn2learn(module, factors):
    l2l = pytest.importorskip("learn2learn")
    from gradagree_opt.adapters.learn2learn import meta_step

    def loss_fn(learner, batch):
        return (learner(batch[0]).square() * batch[1]).sum()

    tasks = (X.unsqueeze(1), torch.tensor(factors))
    maml = l2l.algorithms.MAML(module, lr=0.01)
    meta_step(maml, loss_fn, {"support": tasks, "query": tasks}, DROP)
    adam(module).step()


STEPS = [by_task_batch, by_task_optimizer, by_torchopt, by_plain, by_learn2learn]


@pytest.mark.parametrize("step", STEPS)
def test_no_step_is_taken(module, step):
    before = [p.detach().clone() for p in module.parameters()]
    message = "expected a task that is finite, found NaN or inf in all 2, .*; skip the step, and"
    with pytest.raises(ValueError, match=message) as caught:
        step(module, [NAN, float("inf")])
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, module.parameters(), before))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("step", STEPS)
def test_with_one_task_left_the_step_is_taken(module, step):
    before = [p.detach().clone() for p in module.parameters()]
    step(module, [NAN, 1.0])
    assert not any(map(torch.equal, module.parameters(), before))
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_streamed_batch_refuses_too_and_can_be_used_again(module):
    with pytest.raises(ValueError, match="expected a task that is finite"):
        by_task_batch(module, [NAN, NAN], memory="stream")
    by_task_batch(module, [1.0, NAN], memory="stream")
