"""What each rank runs, by name: ``python programs.py NAME RANK WORLD STORE``.

References are computed before the process group is there, by one process with all tasks.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga

RANK, WORLD, STORE = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
AGGREGATORS = (
    ga.GradientAgreement(),
    ga.GradientAgreement(similarity="cosine"),
    ga.GradientAgreement(include_self=False),
    ga.GradientAgreement(scope="leaf"),
    ga.GradientAgreement(match_norm="mean"),
    ga.GradientAgreement(similarity="cosine", scope=lambda path: path[0], negative="clip"),
    ga.GradientAgreement(normalization="softmax", match_norm=ga.Sum()),
    ga.EqualAgreement(),
    ga.EqualAgreement(similarity="inner", scope="leaf"),
    ga.GramianPower(2),
    ga.Mean(),
    ga.Mean(match_norm=ga.EqualAgreement()),
    ga.Sum(),
    ga.NormShare(),
    ga.NormClipped(),
    ga.GeometricMedian(),
)


def join(timeout: float = 60, backend: str | None = "gloo") -> None:
    """The process group of this test."""
    dist.init_process_group(
        backend,
        init_method=f"file://{STORE}",
        rank=RANK,
        world_size=WORLD,
        timeout=timedelta(seconds=timeout),
    )


def check_same_bits(tree: Any) -> None:
    """Every rank holds the same numbers, to the bit."""
    own = [leaf.detach().numpy().tobytes() for leaf in tree_leaves(tree)]
    each: list[Any] = [None] * WORLD
    dist.all_gather_object(each, own)
    assert all(other == own for other in each)


def check_close(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    """Leaves that differ by rounding alone, relative to the largest entry of each."""
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        size = other.abs().amax() if other.numel() else 0
        assert bool(((one - other).abs() <= tolerance * size).all()), (one, other)


def check_close_together(found: Any, wanted: Any, tolerance: float) -> None:
    """Leaves that differ by rounding alone, relative to the largest entry of all."""
    size = max(float(leaf.abs().amax()) for leaf in tree_leaves(wanted))
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert bool(((one - other).abs() <= tolerance * size).all()), (one, other)


def own(weights: Tensor) -> Tensor:
    share: Tensor = ga.own_share(weights.movedim(-1, 0)).movedim(0, -1)
    return share


def aggregations() -> None:
    """Every aggregator, of stacks of 1, 2 and 7 tasks, at three scales and in two dtypes."""
    join()
    for dtype in (torch.float32, torch.float64):
        for n in (1, 2, 7):
            torch.manual_seed(n)
            stack = {"a": torch.randn(n, 3, 4), "b": torch.randn(n, 5), "c": torch.randn(n)}
            stack["a"][0] = 0
            for scale in (1.0, 1e-30, 1e30) if dtype == torch.float32 else (1.0,):
                grads = {name: leaf.to(dtype) * scale for name, leaf in stack.items()}
                for one in AGGREGATORS:
                    wanted = one.aggregate(grads)
                    found = ga.distributed(one).aggregate(ga.own_share(grads))
                    tolerance = (1e-6 if dtype == torch.float32 else 1e-14) * condition(one, grads)
                    check_close_together(found.update, wanted.update, tolerance)
                    check_close(found.weights, own(wanted.weights), 1e-4)
                    check_same_bits([found.update, list(found.diagnostics)])
                    for a, b in zip(found.diagnostics, wanted.diagnostics, strict=True):
                        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def condition(aggregator: Any, grads: dict[str, Tensor]) -> float:
    """Σ‖g_i‖ ‖S‖ / Σ|g_i · S|, the largest of the groups of leaves."""
    groups = [[leaf] for leaf in grads.values()]
    if aggregator.scope == "global":
        groups = [[*grads.values()]]
    found = 1.0
    for leaves in groups:
        matrix = torch.cat([leaf.double().reshape(len(leaf), -1) for leaf in leaves], 1)
        total = matrix.sum(0)
        scores = (matrix @ total).abs().sum()
        if scores > 0:
            found = max(found, float((matrix.norm(dim=1) * total.norm()).sum() / scores))
    return found


def gramian_in_blocks() -> None:
    """A Gram matrix that takes several messages, of leaves that end in none of them."""
    join()
    from gradagree_opt.core import ranks

    ranks.GATHERED_ENTRIES = 20
    stack = [torch.randn(5, *shape) for shape in ((3, 4), (7,), (), (9,))]
    for tensor in stack:
        dist.broadcast(tensor, 0)
    one = ga.EqualAgreement()
    check_close(ga.distributed(one)(ga.own_share(stack)), one(stack))


def messages() -> None:
    """How many numbers a step sends, whose d is large beside all else."""
    join()
    d, n = 100_000, 2 * WORLD
    torch.manual_seed(0)
    stack = torch.randn(n, d)
    sent: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **options)

    dist.all_reduce = torch.distributed.all_reduce = counting
    for one, vectors, count in (
        (ga.GradientAgreement(), 2, 7),
        (ga.GradientAgreement(similarity="cosine"), 3, 7),
        (ga.GradientAgreement(include_self=False), 3, 7),
        (ga.GradientAgreement(match_norm="mean"), 3, 10),
        (ga.EqualAgreement(), n + 1, 8),
    ):
        for tasks in (ga.own_share(stack), stack[:0] if RANK else stack):
            sent.clear()
            ga.distributed(one)(tasks)
            assert sum(sent) <= (vectors + 0.05) * 4 * d, (one, sum(sent) / 4 / d)
            assert len(sent) == count, (one, len(sent))


def bytes_on_loopback() -> None:
    """What passes the network of this namespace in one step: two vectors, and little else."""
    join()
    d = 1_000_000
    stack = torch.randn(2, d)
    agree = ga.distributed(ga.GradientAgreement())
    agree(stack)

    def passed() -> int:
        dist.barrier()
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
        (loopback,) = [line.split(":")[1] for line in lines if line.strip().startswith("lo:")]
        dist.barrier()
        return int(loopback.split()[0])

    before = passed()
    agree(stack)
    vectors = 2 * 2 * (WORLD - 1) * 4 * d
    assert vectors <= passed() - before <= 1.05 * vectors


def draws() -> None:
    """Random weights are those of the first rank's generator."""
    stack = torch.randn(5, 3)
    wanted = ga.RandomWeights(torch.Generator().manual_seed(3)).aggregate(stack).weights
    join()
    one = ga.RandomWeights(torch.Generator().manual_seed(3 + RANK))
    found = ga.distributed(one).aggregate(ga.own_share(stack))
    check_close(found.weights, own(wanted))


def cancelling() -> None:
    """Signals whose sum is exactly zero, and scales far apart, without a task's own share."""
    join()
    one = ga.GradientAgreement(include_self=False)
    for seed in range(12):
        torch.manual_seed(seed)
        stack = torch.randn(4, 9) * 10.0 ** torch.randint(-3, 4, (4, 1))
        stacks = [
            stack,
            torch.cat([stack, -stack]),
            torch.cat([stack, -stack.sum(0, keepdim=True)]),
        ]
        stacks.append(torch.tensor([[1e30, 0.0], [-1e30, 0.0], [0.0, 1e-30], [0.0, 1e-30]]))
        for each in stacks:
            wanted = one.aggregate(each)
            found = ga.distributed(one).aggregate(ga.own_share(each))
            torch.testing.assert_close(found.weights, own(wanted.weights), rtol=1e-5, atol=1e-6)
            assert found.diagnostics.degenerate == wanted.diagnostics.degenerate


def unlike() -> None:
    """What is not alike on all ranks: refused on all, and the next step works."""
    join()
    last, spread = RANK == WORLD - 1, ga.distributed(ga.GradientAgreement())
    a, b = torch.ones(2, 3), torch.ones(2, 3) * 2
    with refused("rank"):
        spread({"b": b, "a": a} if last else {"a": a, "b": b})
    with refused("form"):
        spread.aggregate(a, b) if last else spread.aggregate(a)
    with refused("rank"):
        spread.aggregate(a[:, :2] if last else a, b)
    with refused("rank"):
        spread.aggregate(a.double() if last else a, b)

    def fails(statistics: ga.Statistics) -> Tensor:
        if last:
            raise ValueError("own mistake")
        return statistics.row_sums

    with refused("own mistake" if last else "rank"):
        ga.distributed(ga.Aggregator(fails))(a)

    optimizer = ga.TaskOptimizer(torch.optim.SGD(Model().parameters(), lr=0.1), spread)
    with refused("rank" if not last else "losses"):
        optimizer.step(None if last else [])
    mixed = ga.distributed(ga.EqualAgreement(scope="leaf"))
    torch.manual_seed(0)
    stack = {"a": torch.randn(4, 3), "b": torch.randn(4, 2).double() * 1e200, "c": a.new_ones(4, 0)}
    check_close(mixed(ga.own_share(stack)), ga.EqualAgreement(scope="leaf")(stack), 1e-4)
    check_close(spread(a), 2 * WORLD * a[0] / (2 * WORLD))


def own_draws() -> None:
    """A weighting that draws by itself: the first rank's draws are those of all."""
    join()
    torch.manual_seed(RANK)

    def drawn(statistics: ga.Statistics) -> Tensor:
        weights = torch.rand_like(statistics.row_sums)
        return weights / weights.sum()

    result = ga.distributed(ga.Aggregator(drawn)).aggregate(torch.eye(2 * WORLD)[2 * RANK :][:2])
    check_close(result.weights, result.update[2 * RANK :][:2])
    torch.testing.assert_close(result.update.sum(), torch.tensor(1.0))


def a_rank_that_runs_out_of_tasks() -> None:
    """TaskBatch where the last rank has no task in a later step, with a length to match."""
    torch.manual_seed(4)
    tasks, last = torch.randn(2 * WORLD, 4, 3), RANK == WORLD - 1
    model = Model()
    join()
    batch = ga.TaskBatch(model, ga.distributed(ga.Mean(match_norm=ga.EqualAgreement())))
    for step in range(2):
        for task in tasks[2 * RANK :][:2] if not (last and step) else []:
            adapted = {name: 0.9 * p for name, p in model.named_parameters()}
            head = 1 + (last and not step)
            loss = functional_call(model, adapted, (task, head)).square().mean()
            batch.add(loss, adapted=adapted)
        result = batch.backward()
        assert (model.heads[2].weight.grad is None) == bool(step)
        check_same_bits([result.update, list(result.diagnostics)])
        assert len(result.losses) == len(result.weights)
        model.zero_grad()


class Model(nn.Module):
    """A trunk, and a head that not every task uses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(3)])

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        result: Tensor = self.heads[head](self.trunk(x).tanh())
        return result


def collected(
    aggregator: Any, tasks: list[Tensor], form: str, memory: str, *, holds_first: bool = True
) -> Any:
    """``.grad`` by name and the weights, of a TaskBatch of one form.

    The second head hangs on the task that comes first of all, which the first rank holds.
    """
    torch.manual_seed(1)
    model = Model()
    batch = ga.TaskBatch(model, aggregator, memory=memory)
    for task in tasks:
        adapted = {name: p + 0 for name, p in model.named_parameters()}
        if form != "multi-task":
            loss = functional_call(model, adapted, (task,)).square().mean()
            grads = torch.autograd.grad(
                loss, [*adapted.values()], create_graph=True, allow_unused=True
            )
            steps = zip(adapted.items(), grads, strict=True)
            adapted = {n: p if g is None else p - 0.1 * g for (n, p), g in steps}
        if form == "Reptile":
            batch.add(adapted=adapted)
        else:
            loss = functional_call(model, adapted, (task,)).square().mean()
            if holds_first and not len(batch):
                loss = loss + model.heads[1](task.new_ones(4)).sum()
            batch.add(loss, **({"adapted": adapted} if form == "MAML" else {}))
    result = batch.backward()
    return {n: p.grad for n, p in model.named_parameters()}, result.weights


def loss_of(params: Any, batch: Tensor) -> Tensor:
    loss: Tensor = functional_call(MODEL, params, (batch,)).square().mean()
    return loss


MODEL = Model()
PARAMS = {name: p.detach() for name, p in MODEL.named_parameters()}


def stepped(name: str, aggregator: Any, tasks: Any) -> Any:
    """Update, losses and weights of one functional step."""
    inner = ga.InnerSGD(0.1, 2)
    if name == "aggregate_gradients":
        return ga.aggregate_gradients(loss_of, PARAMS, tasks["query"], aggregator)
    if name == "Reptile":
        return ga.Reptile(loss_of, inner).step(PARAMS, tasks, aggregator)
    if name == "MetaSGD":
        rates = tree_map(lambda p: torch.full_like(p, 0.1), PARAMS)
        return ga.MetaSGD(loss_of, 1).step({"params": PARAMS, "lr": rates}, tasks, aggregator)
    return ga.MAML(loss_of, inner, signal=name).step(PARAMS, tasks, aggregator)


def loops() -> None:
    """TaskBatch in all forms and every functional step, of more and of fewer tasks than ranks."""
    torch.manual_seed(5)
    forms = [(f, m) for f in ("multi-task", "MAML", "Reptile") for m in ("graph", "stream")]
    steps = ("aggregate_gradients", "displacement", "gradient", "MetaSGD", "Reptile")
    cases = []
    for parameter in MODEL.parameters():
        nn.init.normal_(parameter)
    PARAMS.update((name, p.detach()) for name, p in MODEL.named_parameters())
    for n in (5, 1):
        tasks = {"support": torch.randn(n, 6, 3), "query": torch.randn(n, 6, 3)}
        for one in (ga.GradientAgreement(), ga.EqualAgreement(), ga.Mean(nonfinite="drop")):
            for form in forms:
                wanted = collected(one, [*tasks["query"]], *form)
                cases.append((one, tasks, form, wanted))
            cases += [(one, tasks, step, stepped(step, one, tasks)) for step in steps]
    join()
    for one, tasks, case, wanted in cases:
        mine, spread = ga.own_share(tasks), ga.distributed(one)
        if isinstance(case, tuple):
            grads, weights = collected(spread, [*mine["query"]], *case, holds_first=RANK == 0)
            assert {n for n, g in grads.items() if g is None} == {
                n for n, g in wanted[0].items() if g is None
            }
            there = [n for n, g in grads.items() if g is not None]
            check_close([grads[n] for n in there], [wanted[0][n] for n in there], 1e-4)
            check_close(weights, own(wanted[1]), 1e-4)
            check_same_bits([grads[n] for n in there])
        else:
            found = stepped(case, spread, mine)
            check_close(found.update, wanted.update, 1e-4)
            check_close(found.losses, ga.own_share(wanted.losses), 1e-4)
            check_same_bits([found.update, list(found.diagnostics)])


def replicas() -> None:
    """Fifty steps of an optimizer, a head of one rank among its parameters: the same bits."""
    join()
    torch.manual_seed(2)
    model = Model()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = ga.TaskOptimizer(adam, ga.distributed(ga.GradientAgreement()), module=model)
    generator = torch.Generator().manual_seed(RANK)
    before = [p.clone() for p in model.parameters()]
    for step in range(50):
        tasks = torch.randn((RANK + step) % 3, 4, 3, generator=generator)
        losses = [model(x, head=1 + (RANK == 0)).square().mean() for x in tasks]
        optimizer.zero_grad()
        total = torch.tensor(len(losses))
        dist.all_reduce(total)
        if total:
            optimizer.step(losses)
    check_same_bits([*model.parameters()])
    moved = [bool((a != b).any()) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, True, False, False, True, True, True, True]  # no task used heads[0]


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A sentence that holds all parts, on this rank while the others have theirs."""
    dist.barrier()
    start = time.monotonic()
    with pytest.raises((ValueError, TypeError)) as caught:
        yield
    assert all(part in str(caught.value) for part in parts), caught.value
    # A rank that waits in vain would do so for the 60 s of the group's timeout.
    assert time.monotonic() - start < 20


def failures() -> None:
    """What fails on the last rank is told on all, changes nothing, and the next step works."""
    join()
    last = WORLD - 1
    agree = ga.distributed(ga.GradientAgreement())
    stack = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    spoilt = stack.clone()
    spoilt[1, 0] = torch.nan if last == RANK else 1.0
    with refused(f"1 of rank {last}"):
        agree(spoilt)
    dropping = ga.distributed(ga.GradientAgreement(nonfinite="drop"))
    result = dropping.aggregate(spoilt)
    assert result.diagnostics.nonfinite.sum() == 1 and result.update.isfinite().all()
    words = ("floating-point",) if last == RANK else ("rank", str(last))
    with refused(*words):
        agree(stack.long() if last == RANK else stack)
    with refused("rank", "expected the same"):
        agree(stack[:, :1] if last == RANK else stack)
    cosine = ga.distributed(ga.GradientAgreement(similarity="cosine"))
    with refused(f"{agree} on rank 0 and {cosine} on rank {last}"):
        (cosine if last == RANK else agree)(stack)
    leaf = ga.distributed(ga.GradientAgreement(scope="leaf"))
    with refused(f"float32 [2] of 'a' on rank 0 and float32 [3] of 'a' on rank {last}"):
        leaf({"a": torch.ones(2, 3) if last == RANK else stack, "b": stack})
    with refused("at least one task"):
        agree(stack[:0])

    def broken(params: Any, batch: Tensor) -> Tensor:
        if last == RANK:
            raise ValueError("own mistake")
        return loss_of(params, batch)

    x = torch.randn(2, 6, 3)
    with refused("own mistake" if last == RANK else f"rank {last}"):
        ga.aggregate_gradients(broken, PARAMS, x, agree)
    with refused("own mistake" if last == RANK else f"rank {last}"):
        ga.Reptile(broken, ga.InnerSGD(0.1, 1)).step(PARAMS, {"support": x}, agree)
    late_failure(agree, last, x)
    check_close(agree(stack), ga.GradientAgreement()(torch.cat([stack] * WORLD)))


def left_alone() -> None:
    """A failed add() that is caught: its batch may go on without the task, but none is skipped."""
    join()
    agree, model, last = ga.distributed(ga.GradientAgreement()), Model(), WORLD - 1
    x = torch.ones(4, 3)

    def filled() -> Any:
        batch = ga.TaskBatch(model, agree)
        batch.add(model(x).square().mean())
        if last == RANK:
            with pytest.raises(ValueError, match="expected a scalar loss"):
                batch.add(model(x))
        return batch

    assert len(filled().backward().diagnostics.nonfinite) == WORLD
    dist.barrier()
    for anew in (True, False):
        batch = filled()
        if last == RANK:  # as if the whole step were in a try
            batch.clear()
            batch = ga.TaskBatch(model, agree) if anew else batch
            batch.add(model(x).square().mean())
        with refused("add() failed" if last == RANK else f"rank {last} failed"):
            batch.backward()
    batch = ga.TaskBatch(model, agree)
    batch.add(model(x).square().mean())
    assert len(batch.backward().diagnostics.nonfinite) == WORLD
    optimizer = ga.TaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), agree)
    losses = [model(x).square().mean()]
    with refused("expected a scalar loss" if last == RANK else f"rank {last} failed"):
        optimizer.step([model(x)] if last == RANK else losses)
    optimizer.step([model(x).square().mean()])


def half_precision() -> None:
    """Sums of one rank that float16 cannot hold, though it can hold that of all."""
    join()
    for dtype in (torch.float16, torch.bfloat16):
        stack = torch.tensor([[6e4, 1.0], [5e4, 2.0], [-6e4, 3.0], [-4e4, 5.0]]).to(dtype)
        for one in (ga.Sum(), ga.Mean(match_norm=ga.Sum()), ga.GradientAgreement()):
            wanted = one.aggregate(stack)
            found = ga.distributed(one).aggregate(ga.own_share(stack))
            assert wanted.update.isfinite().all()
            check_close(found.update, wanted.update, torch.finfo(dtype).eps)
    with refused("rank"):
        ga.distributed(ga.Sum())(stack.half() if RANK else stack)


def late_failure(agree: Any, last: int, x: Tensor) -> None:
    """A backward pass that fails on one rank when the weights are known already."""
    model = Model()
    batch = ga.TaskBatch(model, agree)
    for task in x:
        adapted = {name: 0.9 * p for name, p in model.named_parameters()}
        loss = functional_call(model, adapted, (task,)).square().mean()
        if last == RANK:
            loss = Fails.apply(loss)
        batch.add(loss, adapted=adapted)
    with refused("late" if last == RANK else f"rank {last}"):
        batch.backward()
    assert all(p.grad is None for p in model.parameters())


class Fails(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError("late mistake")


def refusals() -> None:
    """What no several ranks can do is refused on each, before anything is sent."""
    agree = ga.GradientAgreement()
    with_message(lambda: ga.own_share(torch.ones(2)), "init_process_group")
    join()
    outside = dist.new_group([0])
    if RANK:
        with_message(lambda: ga.distributed(agree, outside), "rank of the process group")
    else:
        check_close(ga.distributed(agree, outside)(torch.ones(2, 3)), torch.ones(3))
    spread = ga.distributed(agree)
    assert repr(spread) == repr(agree) and type(spread) is type(agree)
    ddp = nn.parallel.DistributedDataParallel(Model())
    with_message(lambda: ga.TaskBatch(ddp, agree), "the module that it wraps")
    maml = ga.MAML(loss_of, ga.InnerSGD(0.1, 1), compile=True)
    x = {"support": torch.randn(1, 2, 3), "query": torch.randn(1, 2, 3)}
    with_message(lambda: maml.step(PARAMS, x, spread), "compile=False")
    reptile = ga.Reptile(loss_of, ga.InnerSGD(0.1, 1), compile=True)
    with_message(lambda: reptile.step(PARAMS, x, spread), "compile=False")
    for engine in ("streamed", "matrix_free"):
        run = lambda engine=engine: ga.aggregate_gradients(  # noqa: E731 # its only use is a call
            loss_of, PARAMS, x["query"], spread, engine=engine
        )
        with_message(run, "rank")


def with_message(call: Callable[[], Any], part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)):
        call()


def lost(before: Callable[[], None], timeout: float, gone: int = WORLD - 1) -> None:
    """A rank does something before its second step: the others name it, nothing changed."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 4, 3)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = ga.TaskOptimizer(adam, ga.distributed(ga.GradientAgreement()))
    optimizer.step([model(task).square().mean() for task in x])
    optimizer.zero_grad()
    kept = [p.detach().clone() for p in model.parameters()]
    if gone == RANK:
        before()
    start = time.monotonic()
    others = f"(none of|that) rank {gone}(, which| is gone)"
    words = "given up on this one" if gone == RANK else others
    with pytest.raises(RuntimeError, match=f"{words}.*checkpoint"):
        optimizer.step([model(task).square().mean() for task in x])
    assert all(map(torch.equal, kept, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert time.monotonic() - start < timeout + 20
    os._exit(0)  # the group cannot be taken down without the rank that is gone


def killed() -> None:
    """One that ends without a word."""
    join(60)
    lost(lambda: os._exit(9), 60)


def killed_in_a_group_of_no_named_backend() -> None:
    """So it is begun by a script for CPUs and GPUs alike; four have neighbours and others."""
    join(60, None)
    lost(lambda: os._exit(9), 60)


def killed_with_its_store() -> None:
    """Rank 0, which holds the store where the others would leave word."""
    place = Path(f"{STORE}.port")
    if RANK == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place.with_suffix(".new").write_text(str(store.port))
        place.with_suffix(".new").replace(place)
    else:
        while not place.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(place.read_text()), is_master=False)
    time_out = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD, timeout=time_out)
    lost(lambda: os._exit(9), 60, gone=0)


def hanging() -> None:
    """One that comes after the timeout."""
    join(5)
    lost(lambda: time.sleep(10), 5)


def leave() -> None:
    """Ends this rank once all have come to their end: gloo's threads may abort in a destructor."""
    Path(f"{STORE}.{RANK}").touch()
    while not all(Path(f"{STORE}.{rank}").exists() for rank in range(WORLD)):
        time.sleep(0.01)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
