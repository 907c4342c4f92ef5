"""Programs of ranks that are unlike, of groups of some of them, and of models that are odd."""

import sys
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import (
    RANK,
    STORE,
    WORLD,
    check_close,
    check_same_bits,
    join,
    leave,
    refused,
    with_message,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradagree_opt as ga
from gradagree_opt.core import ranks, rounding, shards


def unlike_processors() -> None:
    """One that rounds a norm otherwise, as another kind may: the first rank's is that of all."""
    join()
    if RANK:
        norm, last_digits = shards.tree_norm, cycle([0, 2**-22])
        shards.tree_norm = lambda tree: norm(tree) * (1 + next(last_digits))
        ranks.rounding_of = lambda device: f"{rounding.rounding_of(device)} of another kind"
    stack = vectors(2 * WORLD, 1001)
    for one in (
        ga.GradientAgreement(match_norm="mean"),
        ga.EqualAgreement(match_norm=ga.Sum()),
        ga.Mean(match_norm=ga.GradientAgreement()),
    ):
        check_same_bits(ga.distributed(one)(ga.own_share(stack)))


def numbers_of_threads() -> None:
    """So do other numbers of threads, with which a Gram matrix is made."""
    join()
    torch.set_num_threads(1 + 3 * RANK)
    stack = vectors(2 * WORLD, 300_003)
    for one in (ga.EqualAgreement(), ga.GeometricMedian(), ga.Mean(match_norm=ga.GramianPower(2))):
        result = ga.distributed(one).aggregate(ga.own_share(stack))
        check_same_bits([result.update, list(result.diagnostics)])


def vectors(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


class Words(nn.Module):
    """A head that may be tied to the embedding, and a trunk that may be frozen."""

    def __init__(
        self, *, tied: bool = False, frozen: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.trunk = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.trunk.requires_grad_(not frozen)
        self.to(dtype)

    def forward(self, words: Tensor) -> Tensor:
        result: Tensor = self.head(self.trunk(self.embedding(words)).tanh())
        return result


def collected(model: Words, aggregator: Any, tasks: Any, memory: str) -> dict[str, Tensor]:
    """``.grad`` of those parameters that have one."""
    batch = ga.TaskBatch(model, aggregator, memory=memory)
    for words in tasks:
        batch.add(cross_entropy(model(words).float(), words))
    batch.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def odd_models() -> None:
    """Tied, frozen and bfloat16 parameters, uneven tasks, and none on the first rank."""
    torch.manual_seed(5)
    tasks, cases = torch.randint(0, 7, (5, 6)), []
    for tied, frozen, dtype in (
        (True, False, torch.float32),
        (False, True, torch.float32),
        (True, True, torch.float64),
        (False, False, torch.bfloat16),
    ):
        for one in (ga.GradientAgreement(), ga.Mean(match_norm=ga.EqualAgreement())):
            for memory in ("graph", "stream"):
                make = partial(Words, tied=tied, frozen=frozen, dtype=dtype)
                cases.append((make, one, memory, collected(make(), one, tasks, memory)))
    join()
    rest = tasks[:0] if RANK == 0 else tasks.tensor_split(WORLD - 1)[RANK - 1]
    for make, one, memory, wanted in cases:
        for mine in (ga.own_share(tasks), rest):
            found = collected(make(), ga.distributed(one), mine, memory)
            assert found.keys() == wanted.keys()
            dtype = next(iter(wanted.values())).dtype
            check_close(found, wanted, 4e-2 if dtype == torch.bfloat16 else 1e-5)
            check_same_bits([leaf.float() for leaf in found.values()])


def some_ranks() -> None:
    """Two groups that share a rank, each with an aggregator; ranks are counted within a group."""
    join()
    torch.manual_seed(0)
    stack, equal = torch.randn(5, 8), ga.EqualAgreement()
    agree = ga.GradientAgreement()
    first, last = dist.new_group([0, 1]), dist.new_group([1, 2])
    if RANK < 2:
        mine = ga.own_share(stack, first)
        check_close(ga.distributed(equal, first)(mine), equal(stack))
    if RANK:
        mine = ga.own_share(stack, last)
        check_close(ga.distributed(agree, last)(mine), agree(stack))
        spoilt = stack.index_fill(0, torch.tensor(4), torch.nan)
        with pytest.raises(ValueError, match="1 of rank 1"):
            ga.distributed(agree, last)(ga.own_share(spoilt, last))
    twice = ga.distributed(ga.distributed(agree, first if RANK < 2 else last))
    check_close(twice(ga.own_share(stack)), agree(stack))
    for group in ([0, 1], dist.device_mesh.init_device_mesh("cpu", (WORLD,))):
        with pytest.raises(TypeError, match="expected a process group, found"):
            ga.distributed(agree, group)
    with_message(lambda: twice(torch.ones(2, 3, device="meta")), "found meta")
    spread = ga.distributed(agree, dist.new_group([*range(WORLD)]))
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{STORE}-anew", rank=RANK, world_size=WORLD)
    with_message(lambda: spread(stack), "found one that was destroyed")
    check_close(twice(ga.own_share(stack)), agree(stack))


def one_rank_fails() -> None:
    """A stale graph, a parameter frozen and a loss that raises on the last rank alone."""
    join()
    model, last = Words(), RANK == WORLD - 1
    words, agree = torch.arange(6), ga.distributed(ga.GradientAgreement())

    def losses(count: int = 2) -> list[Tensor]:
        return [cross_entropy(model(words + number % 2), words) for number in range(count)]

    def step(each: Any) -> None:
        batch = ga.TaskBatch(model, agree)
        for loss in each:
            batch.add(loss)
        batch.backward()

    stale = losses()
    if last:
        stale[0].backward()
        model.zero_grad()
    with refused("graph is alive" if last else f"rank {WORLD - 1} failed"):
        step(stale)
    model.trunk.requires_grad_(not last)
    with refused("trunk.weight on rank 0 and head.weight on rank 1"):
        step(losses())
    model.trunk.requires_grad_(True)

    def raising() -> Any:
        yield from losses(1)
        if last:
            raise ValueError("own mistake")

    optimizer = ga.TaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), agree)
    with refused("own mistake" if last else f"rank {WORLD - 1} failed"):
        optimizer.step(raising())
    assert all(p.grad is None for p in model.parameters())
    step(losses(1 + RANK))
    check_same_bits([p.grad for p in model.parameters()])


def one_task_and_forty() -> None:
    """Gradients of 0.8 MB on one rank and of 32 MB on the other: both send the same messages."""
    torch.manual_seed(0)
    params = {"w": torch.randn(200_000), "b": torch.randn(3)}
    tasks = (0.01 * torch.randn(41, 1), 0.01 * torch.randn(41))

    def loss(params: Any, task: Any) -> Tensor:
        result: Tensor = ((params["w"] * task[0]).sum() * task[1] + params["b"].sum()).tanh()
        return result

    def updates(aggregator: Any, tasks: Any) -> Any:
        maml = ga.MAML(loss, ga.InnerSGD(0.1, 1))
        one = ga.aggregate_gradients(loss, params, tasks, aggregator)
        two = maml.step(params, {"support": tasks, "query": tasks}, aggregator)
        return one.update, two.update

    each = (ga.GradientAgreement(), ga.Mean(match_norm=ga.EqualAgreement()))
    wanted = [updates(one, tasks) for one in each]
    join()
    mine = tuple(leaf[1:] if RANK else leaf[:1] for leaf in tasks)
    for one, update in zip(each, wanted, strict=True):
        found = updates(ga.distributed(one), mine)
        check_close(found, update, 2e-4)
        check_same_bits(found)
    # What an engine cannot do is refused in the same words where there is no task.
    none = tuple(leaf[:0] for leaf in tasks) if RANK else tasks
    for options, words in (
        ({"engine": "streamed"}, "engine='streamed'"),
        ({"engine": "matrix_free"}, "engine='matrix_free'"),
        ({"compile": True}, "compile=False"),
    ):
        with refused(words):
            ga.aggregate_gradients(loss, params, none, ga.distributed(ga.Mean()), **options)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
