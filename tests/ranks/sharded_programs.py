"""Programs of ranks that hold parts of the parameters: FSDP2 on one mesh, and tasks × shards."""

import copy
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import (
    AGGREGATORS,
    RANK,
    STORE,
    WORLD,
    check_close,
    check_same_bits,
    counted,
    join,
    leave,
    refused,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import gradagree_opt as ga


class Model(nn.Module):
    """Odd sizes, so that parts are uneven and some empty; the heads are not used by every task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(3)])
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        result: Tensor = self.heads[head](self.trunk(x).tanh()) * self.scale
        return result


def sharded(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    for part in [model.trunk, *model.heads]:  # type: ignore[misc]
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def full(tensors: Any) -> list[Tensor]:
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def collected(
    model: nn.Module, aggregator: Any, tasks: list[Tensor], memory: str = "graph", first: int = 0
) -> Any:
    """``.grad`` and the result; each task has a head, but for the last one nobody has."""
    batch = ga.TaskBatch(model, aggregator, memory=memory)
    for number, x in enumerate(tasks):
        batch.add(model(x, head=(first + number) % 2).square().mean())
    result = batch.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return grads, result


def check_step(model: nn.Module, one: Any, wanted: Any, mine: list[Tensor], first: int) -> None:
    for memory in ("graph", "stream"):
        grads, found = collected(model, ga.distributed(one), mine, memory, first)
        expected, whole = wanted
        assert {n for n, g in grads.items() if g is None} == {
            n for n, g in expected.items() if g is None
        }
        assert any(isinstance(g, DTensor) for g in grads.values())
        there = [n for n, g in grads.items() if g is not None]
        check_close(full(grads[n] for n in there), [expected[n] for n in there], 1e-4)
        weights = whole.weights[..., first : first + len(mine)]
        check_close(found.weights, weights, 1e-4)
        check_same_bits([full(found.update.values()), list(found.diagnostics)])
        for a, b in zip(found.diagnostics, whole.diagnostics, strict=True):
            if not bool(b.isnan().any()):  # one process may save what it does not need
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def fsdp() -> None:
    """One mesh of all ranks: all have the same tasks."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 4, 3)
    wanted = [collected(model, one, [*x]) for one in AGGREGATORS]
    join()
    parts = sharded(copy.deepcopy(model), init_device_mesh("cpu", (WORLD,)))
    for one, each in zip(AGGREGATORS, wanted, strict=True):
        check_step(parts, one, each, [*x], 0)
    check_messages(parts, 9)


def check_messages(model: nn.Module, count: int) -> None:
    """Header, table and words for all; known bad tasks, units, lengths, the unit of the sum, and
    the norm of the update over the mesh; d numbers twice to those with the same part."""
    stack = [torch.stack([p.detach(), 2 * p.detach()]) for p in model.parameters()]
    with counted() as sent:
        ga.distributed(ga.GradientAgreement())(stack)
    assert len(sent) == count, len(sent)


def tasks_by_shards() -> None:
    """Two meshes of two ranks, with two tasks and one, then with three and none."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 4, 3)
    wanted = [collected(model, one, [*x]) for one in AGGREGATORS]
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    before = copy.deepcopy(model)
    for _ in range(3):
        adam.zero_grad()
        losses = [model(each).square().mean() for each in x]
        ga.TaskOptimizer(adam, ga.EqualAgreement()).step(losses)
    join()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "shards"))
    group = mesh["tasks"].get_group()
    mine = [*ga.own_share(x, group)]
    first = 2 * mesh.get_local_rank("tasks")
    parts = sharded(copy.deepcopy(before), mesh["shards"])
    for one, each in zip(AGGREGATORS, wanted, strict=True):
        check_step(parts, one, each, mine, first)
    check_step(parts, ga.EqualAgreement(), wanted[7], [] if first else [*x], 3 if first else 0)
    adam = torch.optim.Adam(parts.parameters(), lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        losses = [parts(each).square().mean() for each in mine]
        ga.TaskOptimizer(adam, ga.distributed(ga.EqualAgreement())).step(losses)
    used = [n for n, _ in parts.named_parameters() if "heads.1" not in n and "heads.2" not in n]
    found = dict(parts.named_parameters())
    check_close(full(found[n] for n in used), [model.get_parameter(n) for n in used], 1e-3)
    check_same_bits(full(found.values()))
    check_messages(parts, 11)
    bad_tasks(parts, mine, first, group)


def bad_tasks(model: nn.Module, mine: list[Tensor], first: int, tasks_group: Any) -> None:
    """NaN in the part of one rank; tasks that differ on one mesh; other groups; inner steps."""
    agree = ga.distributed(ga.GradientAgreement())
    stack = [torch.stack([p.detach(), 2 * p.detach()]) for p in model.parameters()]
    dropped = ga.distributed(ga.GradientAgreement(nonfinite="drop"))

    def fails(statistics: ga.Statistics) -> Tensor:
        if RANK == 1:
            raise ValueError("own mistake")
        return statistics.row_sums

    for draws_itself in (False, True):
        fails.draws_itself = draws_itself  # type: ignore[attr-defined]
        with refused("own mistake" if RANK == 1 else "rank 1 failed"):
            ga.distributed(ga.Aggregator(fails)).aggregate(stack)
    if RANK == 1:
        stack[1].to_local()[1, 0] = torch.nan  # in a part that the first rank has not
    with refused("1 of rank 0"):
        agree.aggregate(stack)
    result = dropped.aggregate(stack)
    assert result.diagnostics.nonfinite.tolist() == [False, True, False, False]
    assert all(bool(leaf.isfinite().all()) for leaf in full(result.update))
    with refused("same tasks on all ranks that share parameters"):
        agree.aggregate([leaf[:1] if RANK == 3 else leaf for leaf in stack])
    with refused("floating-point" if RANK == 1 else "rank 1 failed"):
        dropped.aggregate([leaf.long() for leaf in stack] if RANK == 1 else stack)
    with refused("a group of whole meshes"):
        ga.distributed(ga.Mean(), tasks_group).aggregate(stack)
    batch = ga.TaskBatch(model, agree)
    adapted = {n: p.detach() * 0.9 for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="losses alone of sharded parameters"):
        batch.add(model(mine[0]).mean(), adapted=adapted)
    params = dict(model.named_parameters())
    tasks = {"support": torch.ones(1, 2, 3), "query": torch.ones(1, 2, 3)}
    maml = ga.MAML(lambda params, x: x.sum(), ga.InnerSGD(0.1, 1))
    with pytest.raises(ValueError, match="found DTensor"):
        maml.step(params, tasks, ga.distributed(ga.Mean()))
    gathered(model, mine)
    after_a_forward_pass(model, mine)


def gathered(model: Any, mine: list[Tensor]) -> None:
    """FSDP gathers gradients, of a part of the modules too: refused, and nothing is changed."""
    model.reshard()
    mean, sgd = ga.distributed(ga.Mean()), torch.optim.SGD(model.parameters(), lr=0.1)
    before = full(p.detach().clone() for p in model.parameters())

    def step() -> None:
        ga.TaskOptimizer(sgd, mean).step([model(x).square().mean() for x in mine])

    for part in (model, model.trunk):
        batch = ga.TaskBatch(model, mean, memory="stream")
        part.set_requires_gradient_sync(False)
        with refused("gathers the gradient of", "set_requires_gradient_sync(True)"):
            step()
        with refused("gathers the gradient of"):
            batch.add(model(mine[0]).square().mean())
        with refused("found none on any rank"):
            batch.backward()
        model(mine[0]).mean().backward()
        part.set_requires_gradient_sync(True)
        with refused("gathers the gradient of"):  # which would be added to the first task's
            step()
        model(mine[0]).mean().backward()
        sgd.zero_grad()
    check_close(full(model.parameters()), before, 0)
    step()


def after_a_forward_pass(model: Any, mine: list[Tensor]) -> None:
    """FSDP shows whole parameters then: their names are known, but nobody steps their .grad."""
    spread = ga.distributed(ga.GradientAgreement(scope=lambda path: path[:5]))
    model.reshard()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = [model(x).square().mean() for x in mine]
    result = ga.TaskOptimizer(sgd, spread, module=model).step(losses)
    assert result.update.keys() == dict(model.named_parameters()).keys()
    model(mine[0])
    assert not isinstance(model.scale, DTensor)
    for call in (
        ga.TaskBatch,
        lambda params, one: ga.TaskOptimizer(type(sgd)(params), one).step([]),
    ):
        with refused("FSDP puts it together for a forward pass"):
            call(list(model.parameters()), ga.distributed(ga.Mean()))


def another_process_group() -> None:
    """One aggregator over process groups of which each is destroyed before the next is made."""
    torch.manual_seed(0)
    x, one = torch.randn(4, 4, 3), ga.GradientAgreement()
    model, spread = Model(), ga.distributed(one)
    wanted, _ = collected(model, one, [*x])
    for number in range(2):
        join(store=f"{STORE}-{number}")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "shards"))
        parts = sharded(copy.deepcopy(model), mesh["shards"])
        found, _ = collected(parts, spread, [*ga.own_share(x, mesh["tasks"].get_group())])
        there = [n for n, g in wanted.items() if g is not None]
        check_close(full(found[n] for n in there), [wanted[n] for n in there], 1e-4)
        dist.destroy_process_group()


def replicated() -> None:
    """A mesh that replicates over one of its dimensions: all ranks have the same tasks."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 4, 3)
    wanted = [collected(model, one, [*x]) for one in AGGREGATORS[4:8]]
    join()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    parts = sharded(copy.deepcopy(model), mesh)
    for one, each in zip(AGGREGATORS[4:8], wanted, strict=True):
        check_step(parts, one, each, [*x], 0)
    parts.set_requires_all_reduce(False)  # type: ignore[operator] # FSDP's
    with refused("gathers the gradient of"):
        collected(parts, ga.distributed(ga.Mean()), [*x])


def half_precision() -> None:
    """FSDP computes in bfloat16: weights of all ranks are the same, the update as near as that."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 4, 3)
    wanted, whole = collected(model, ga.GradientAgreement(), [*x])
    join()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parts = sharded(copy.deepcopy(model), init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    found, result = collected(parts, ga.distributed(ga.GradientAgreement()), [*x])
    there = [n for n, g in found.items() if g is not None]
    check_close(full(found[n] for n in there), [wanted[n] for n in there], 0.1)
    check_close(result.weights, whole.weights, 0.1)
    check_same_bits([result.weights, full(result.update.values())])


def data_by_shards() -> None:
    """The ranks of one mesh have halves of a task's examples: its gradient is that of the whole."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 2 * WORLD, 3)
    wanted, _ = collected(model, ga.EqualAgreement(), [*x])
    join()
    parts = sharded(copy.deepcopy(model), init_device_mesh("cpu", (WORLD,)))
    mine = [task[2 * RANK :][:2] for task in x]
    found, _ = collected(parts, ga.distributed(ga.EqualAgreement()), mine)
    there = [n for n, g in wanted.items() if g is not None]
    check_close(full(found[n] for n in there), [wanted[n] for n in there], 1e-4)
    dist.barrier()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
