"""Programs of ranks whose modules are wrapped: DistributedDataParallel, copies of aggregators."""

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import (
    RANK,
    WORLD,
    Model,
    check_close,
    check_same_bits,
    join,
    leave,
    own,
    trained,
    with_message,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import gradagree_opt as ga


class Normalised(nn.Module):
    """Running statistics, which DistributedDataParallel sends in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result


def wrapped() -> None:
    """What DistributedDataParallel wraps and its wrapper: three steps of uneven tasks are exact."""
    torch.manual_seed(3)
    # In float64: three steps with BatchNorm make thousands of times as much of rounding.
    x, last = torch.randn(3, 4, 3).double(), WORLD - 1
    options: list[dict[str, Any]] = [{}, {"find_unused_parameters": True}]
    options += [{"gradient_as_bucket_view": True}]
    cases = []
    for make in (Normalised, Model):
        start = make().double()
        for one in (ga.EqualAgreement(), ga.GradientAgreement()):
            for optimizes in (False, True):
                model = copy.deepcopy(start)
                cases.append((start, one, optimizes, trained(model, one, [*x], optimizes)))
    join()
    for start, one, optimizes, (wanted, losses) in cases:
        for option in options:
            ddp = nn.parallel.DistributedDataParallel(
                copy.deepcopy(start), broadcast_buffers=False, **option
            )
            inner = nn.parallel.DistributedDataParallel(copy.deepcopy(start), **option).module
            for model in (ddp, inner):
                spread = ga.distributed(one)
                found, own_losses = trained(model, spread, [*ga.own_share(x)], optimizes)
                check_close(own_losses, own(losses), 1e-9)
                check_close(found, wanted, 1e-9)
                check_same_bits(found)
    sends = nn.parallel.DistributedDataParallel(Normalised())
    with_message(lambda: ga.TaskBatch(sends, spread), "broadcast_buffers=False")
    static = nn.parallel.DistributedDataParallel(Model(), static_graph=True)
    with_message(lambda: ga.TaskBatch(static, spread), "static_graph")
    with_message(lambda: ga.TaskBatch(ddp, ga.Mean()), "ga.distributed")
    # Between steps, DistributedDataParallel's own backward pass averages as ever.
    ddp = nn.parallel.DistributedDataParallel(Model().double(), find_unused_parameters=True)
    for _ in range(2):
        batch = ga.TaskBatch(ddp, spread)
        for task in x[: 1 + (last == RANK)]:
            batch.add(ddp(task).square().mean())
        batch.backward()
        check_same_bits([p.grad for p in ddp.parameters() if p.grad is not None])
        ddp.zero_grad()
        ddp(x[RANK]).square().mean().backward()
        check_same_bits([p.grad for p in ddp.parameters() if p.grad is not None])
        ddp.zero_grad()


def stepped(model: nn.Module, by: str, tasks: Tensor) -> list[list[Tensor]]:
    """Parameters after each step of SGD, on one task a rank."""
    wrapped = nn.parallel.DistributedDataParallel(model) if "DDP" in by else model
    sgd, mean = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), ga.distributed(ga.Mean())
    after = []
    for task in tasks:
        sgd.zero_grad()
        loss = wrapped(task).square().mean() if task.is_floating_point() else wrapped(task).sum()
        if by == "DDP":
            loss.backward()
            sgd.step()
        elif by == "TaskOptimizer":
            ga.TaskOptimizer(sgd, mean).step([loss])
        else:
            batch = ga.TaskBatch(wrapped, mean)
            batch.add(loss)
            batch.backward()
            sgd.step()
        after.append([p.detach().clone() for p in model.parameters()])
    return after


def plain_mean() -> None:
    """DistributedDataParallel's own mean of one task a rank is that of ga.Mean(), to the bit.

    It holds where an addition of W numbers has one result. With more than two ranks gloo's ring
    begins at another rank in each piece of a message, and DistributedDataParallel cuts its message
    elsewhere than a step does: then sums differ by their rounding, and are looked at in float64.
    """
    join()
    torch.manual_seed(7)
    deep = nn.Sequential(
        nn.Linear(30, 200), nn.Tanh(), nn.Linear(200, 7), nn.Tanh(), nn.Linear(7, 1)
    )
    random, counts = torch.randn(6, WORLD, 8, 30), torch.randint(50, (6, WORLD, 60))
    forms = ("TaskBatch", "TaskOptimizer", "TaskBatch of DDP")
    # The gradient of a row is how often it is asked for: such numbers are added up exactly.
    cases: list[tuple[nn.Module, Tensor]] = [(nn.Embedding(50, 40), counts)]
    cases += [(deep, random)] * (WORLD == 2)
    for start, tasks in cases:
        wanted = stepped(copy.deepcopy(start), "DDP", tasks[:, RANK])
        for by in forms:
            found = stepped(copy.deepcopy(start), by, tasks[:, RANK])
            assert all(map(torch.equal, tree_leaves(found), tree_leaves(wanted))), by
        assert not torch.equal(wanted[0][0], wanted[-1][0])
    exact = copy.deepcopy(deep).double()
    grads = []
    for task in random[0].double():
        exact.zero_grad()
        exact(task).square().mean().backward()
        grads.append([p.grad for p in exact.parameters()])
    for by in ("DDP", *forms):
        found = stepped(copy.deepcopy(deep), by, random[:1, RANK])[0]
        for p, start, *each in zip(found, deep.parameters(), *grads, strict=True):
            stack = torch.stack(each)
            size = start.abs() + 0.1 * stack.abs().amax()
            off = (p.double() - (start.double() - 0.1 * stack.mean(0))).abs()
            assert bool((off <= 2e-6 * size).all()), by


def functional_through_the_wrapper() -> None:
    """Adapted parameters called through ``.module``, for a TaskBatch of the wrapper."""
    torch.manual_seed(3)
    x, model = torch.randn(3, 4, 3), Model()
    wanted = collected_by(model, model, ga.GradientAgreement(), [*x])
    join()
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    found = collected_by(
        ddp, ddp.module, ga.distributed(ga.GradientAgreement()), [*ga.own_share(x)]
    )
    check_close(found, wanted, 1e-4)
    check_same_bits(found)


def collected_by(given: nn.Module, called: nn.Module, aggregator: Any, tasks: list[Tensor]) -> Any:
    batch = ga.TaskBatch(given, aggregator)
    for task in tasks:
        params = dict(called.named_parameters())
        loss = functional_call(called, params, (task,)).square().mean()
        grads = torch.autograd.grad(loss, [*params.values()], create_graph=True, allow_unused=True)
        pairs = zip(params.items(), grads, strict=True)
        adapted = {n: p if g is None else p - 0.1 * g for (n, p), g in pairs}
        batch.add(functional_call(called, adapted, (task,)).square().mean(), adapted=adapted)
    return batch.backward().update


def copies() -> None:
    """An aggregator made before the process group, copied and pickled: the same numbers."""
    early = ga.distributed(ga.EqualAgreement())
    with_message(lambda: early(torch.ones(2, 3)), "init_process_group")
    join()
    torch.manual_seed(0)
    stack = torch.randn(3, 5)
    wanted = ga.EqualAgreement()(stack)
    group = dist.new_group([*range(WORLD)])
    other = ga.distributed(ga.EqualAgreement(), group)
    module = nn.Linear(1, 1)
    module.aggregator = other  # type: ignore[assignment]
    for each in (
        early,
        copy.deepcopy(early),
        pickle.loads(pickle.dumps(early)),
        other,
        copy.deepcopy(module).aggregator,
    ):
        check_close(each(ga.own_share(stack)), wanted)
    with pytest.raises(TypeError, match="make it anew where it is loaded"):
        pickle.dumps(other)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
