"""nonfinite="drop": a step is as if the dropped tasks were not there, None in ``.grad`` too."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

import gradagree_opt as ga
from gradagree_opt.engines import candidates

AGGREGATORS = [ga.GradientAgreement, ga.EqualAgreement, ga.Mean, ga.GeometricMedian]
X = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BAD = 2
"""A task whose head no other has."""
OTHERS = [task for task in range(len(X)) if task != BAD]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 4, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=torch.float64) for _ in X)

    def forward(self, task, trunk=None):
        hidden = functional_call(self.trunk, trunk or {}, X[task]).tanh()
        loss = self.heads[task](hidden).square().mean()
        return loss * float("nan") if task == BAD else loss

    def adapted(self, task):
        """The trunk after an inner step of a sound loss."""
        trunk = dict(self.trunk.named_parameters())
        inner = self.heads[task](self.trunk(X[task])).square().mean()
        grads = torch.autograd.grad(inner, [*trunk.values()], create_graph=True)
        return {name: p - 0.1 * grad for (name, p), grad in zip(trunk.items(), grads, strict=True)}


def multi_task(model, optimizer, aggregator, tasks, memory="graph"):
    batch = ga.TaskBatch(model, aggregator, memory=memory)
    for task in tasks:
        batch.add(model(task))
    batch.backward()
    optimizer.step()


def maml(model, optimizer, aggregator, tasks, memory="graph"):
    batch = ga.TaskBatch(model, aggregator, memory=memory)
    for task in tasks:
        trunk = model.adapted(task)
        adapted = {f"trunk.{name}": p for name, p in trunk.items()}
        batch.add(model(task, trunk), adapted=adapted)
    batch.backward()
    optimizer.step()


def task_optimizer(model, optimizer, aggregator, tasks):
    ga.TaskOptimizer(optimizer, aggregator).step([model(task) for task in tasks])


LOOPS = {
    "add(loss)": multi_task,
    "add(loss), streamed": partial(multi_task, memory="stream"),
    "add(loss, adapted=…)": maml,
    "add(loss, adapted=…), streamed": partial(maml, memory="stream"),
    "TaskOptimizer": task_optimizer,
}


def trained(step, aggregator, tasks):
    """Parameters and gradients after a step of every task, and one of some."""
    model = Heads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    step(model, optimizer, aggregator, OTHERS)
    optimizer.zero_grad()
    step(model, optimizer, aggregator, tasks)
    return {name: (p.detach(), p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("stack_bytes", [0, candidates.STACK_BYTES])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("step", LOOPS.values(), ids=LOOPS)
def test_a_dropped_task_leaves_no_trace(step, aggregator, stack_bytes, monkeypatch):
    monkeypatch.setattr(candidates, "STACK_BYTES", stack_bytes)
    found = trained(step, aggregator(nonfinite="drop"), range(len(X)))
    expected = trained(step, aggregator(), OTHERS)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found[f"heads.{BAD}.weight"][1] is None


def test_a_task_of_weight_0_is_none_that_is_dropped():
    w, own = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    batch = ga.TaskBatch([w, own], ga.GradientAgreement(negative="clip", nonfinite="drop"))
    for loss in (3 * w.sum(), 2 * w.sum(), -w.sum() + 0.1 * own.sum()):
        batch.add(loss)
    assert batch.backward().weights[2] == 0
    assert torch.equal(own.grad, torch.zeros(1))
