"""Programs of ranks that are to be refused, or of which one fails."""

import sys
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import (
    PARAMS,
    RANK,
    WORLD,
    Model,
    check_close,
    join,
    leave,
    loss_of,
    refused,
    with_message,
)
from torch import Tensor, nn
from torch.func import functional_call

import gradagree_opt as ga
from gradagree_opt.engines.compilation import COMPILES_FROM

COMPILES = torch.__version__ >= COMPILES_FROM


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

    for match_norm in (None, "mean", ga.GradientAgreement()):
        with refused("own mistake" if last else "rank"):
            ga.distributed(ga.Aggregator(fails, match_norm=match_norm))(a)
    fails.draws_itself = True  # type: ignore[attr-defined] # so that the first rank's is told
    for match_norm in (None, "mean", ga.GradientAgreement()):
        with refused("own mistake" if last else "rank"):
            ga.distributed(ga.Aggregator(fails, match_norm=match_norm))(a)

    optimizer = ga.TaskOptimizer(torch.optim.SGD(Model().parameters(), lr=0.1), spread)
    with refused("rank" if not last else "losses"):
        optimizer.step(None if last else [])
    mixed = ga.distributed(ga.EqualAgreement(scope="leaf"))
    torch.manual_seed(0)
    stack = {"a": torch.randn(4, 3), "b": torch.randn(4, 2).double() * 1e200, "c": a.new_ones(4, 0)}
    check_close(mixed(ga.own_share(stack)), ga.EqualAgreement(scope="leaf")(stack), 1e-4)
    check_close(spread(a), 2 * WORLD * a[0] / (2 * WORLD))


def unlike_steps() -> None:
    """What pairs by its shapes and is no step of one method: refused on all, one without tasks too.

    Displacements would be added to gradients otherwise, and some tasks adapted and others not.
    """
    x, model, tasks = torch.ones(4, 3), Model(), torch.ones(1, 4, 3)
    both = {"support": tasks, "query": tasks}
    start = {name: torch.full_like(p, 0.3) for name, p in PARAMS.items()}
    reptile, last = ga.Reptile(loss_of, ga.InnerSGD(0.1, 1)), RANK == WORLD - 1
    wanted = reptile.step(start, both, ga.Mean()).update
    join()
    mean = ga.distributed(ga.Mean())

    def add(batch: Any, form: str) -> None:
        adapted = {name: 0.9 * p for name, p in model.named_parameters()}
        loss = functional_call(model, adapted if "adapted" in form else {}, (x,)).square().mean()
        batch.add(*[loss] * ("loss" in form), **{"adapted": adapted} if "=" in form else {})

    def functional(form: str, tasks: dict[str, Tensor], aggregator: Any) -> Any:
        inner = ga.InnerSGD(0.1, 1)
        if form == "Reptile":
            return ga.Reptile(loss_of, inner).step(PARAMS, tasks, aggregator)
        if form == "MAML":
            return ga.MAML(loss_of, inner).step(PARAMS, tasks, aggregator)
        return ga.aggregate_gradients(loss_of, PARAMS, tasks["query"], aggregator)

    for one in (ga.GradientAgreement(), ga.EqualAgreement(), ga.Mean(match_norm="agreement")):
        spread = ga.distributed(one)
        for forms in permutations(("add(loss)", "add(adapted=…)", "add(loss, adapted=…)"), 2):
            batch = ga.TaskBatch(model, spread)
            if RANK or WORLD == 2:  # a rank without tasks is of no form
                add(batch, forms[last])
            with refused(*forms, f"on rank {WORLD - 1}; call the same step"):
                batch.backward()
        assert all(p.grad is None for p in model.parameters())
        for names in permutations(("Reptile", "MAML", "add(loss)"), 2):
            share = {name: leaf[:RANK] for name, leaf in both.items()}  # none on the first rank
            with refused(*names, "call the same step"):
                functional(names[last], share, spread)
    # A batch by hand is of no form, and goes with any.
    by_hand = {name: leaf[None] for name, leaf in wanted.items()}
    result = mean.aggregate(by_hand) if RANK else reptile.step(start, both, mean)
    check_close(result.update, wanted)


def own_decisions() -> None:
    """A weighting that decides otherwise on each rank and does not say so: refused on all."""
    join()
    torch.manual_seed(RANK)
    stack = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    count = [0.0]

    def drawn(statistics: ga.Statistics) -> Tensor:
        return torch.rand_like(statistics.row_sums)

    def remembering(statistics: ga.Statistics) -> Tensor:
        count[0] += 1 + RANK
        return statistics.row_sums / count[0]

    def in_another_order(statistics: ga.Statistics) -> Tensor:
        return statistics.row_sums.sort(descending=RANK == 1).values

    for weighting in (drawn, remembering, in_another_order):
        with refused("same weights on all ranks", "draws_itself"):
            ga.distributed(ga.Aggregator(weighting))(stack)
    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused("same weights on all ranks"):
        losses = [model(x).square().mean() for x in torch.ones(2, 4, 3)]
        ga.TaskOptimizer(optimizer, ga.distributed(ga.Aggregator(drawn))).step(losses)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())

    def rounding(statistics: ga.Statistics) -> Tensor:
        sums = statistics.row_sums
        return sums / sums.abs().sum() * (1 + 1e-6 * RANK)

    def lost(statistics: ga.Statistics) -> Tensor:
        return statistics.row_sums * torch.nan

    check_close(
        ga.distributed(ga.Aggregator(rounding))(stack),
        ga.Aggregator(rounding)(torch.cat([stack] * WORLD)),
    )
    with refused("NaN"):
        ga.distributed(ga.Aggregator(lost))(stack)
    torch.manual_seed(5)  # the same draws on all
    ga.distributed(ga.Aggregator(drawn))(stack)


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
    if COMPILES:
        compiled = ga.Reptile(loss_of, ga.InnerSGD(0.1, 1), compile=last == RANK)
        with refused("compile=False" if last == RANK else f"rank {last}"):
            compiled.step(PARAMS, {"support": x}, agree)
    late_failure(agree, last, x, 1)
    for passes in (1, 2):
        late_failure(ga.distributed(ga.Mean(match_norm="agreement")), last, x, passes)
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


def late_failure(agree: Any, last: int, x: Tensor, passes: int) -> None:
    """A backward pass that fails on one rank when the weights are known already."""
    model, left = Model(), [passes * len(x)]
    batch = ga.TaskBatch(model, agree)
    for task in x:
        adapted = {name: 0.9 * p for name, p in model.named_parameters()}
        loss = functional_call(model, adapted, (task,)).square().mean()
        if last == RANK:
            loss = Fails.apply(loss, left)
        batch.add(loss, adapted=adapted)
    with refused("late" if last == RANK else f"rank {last}"):
        batch.backward()
    assert all(p.grad is None for p in model.parameters())


class Fails(torch.autograd.Function):
    """Fails in the last of so many backward passes as are left."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, left: list[int]) -> Tensor:
        ctx.left = left
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.left[0] -= 1
        if not ctx.left[0]:
            raise ValueError("late mistake")
        return grads[0], None


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
    x = {"support": torch.randn(1, 2, 3), "query": torch.randn(1, 2, 3)}
    for make in (ga.MAML, ga.Reptile) if COMPILES else ():
        compiled = make(loss_of, ga.InnerSGD(0.1, 1), compile=True)
        with_message(lambda compiled=compiled: compiled.step(PARAMS, x, spread), "compile=False")
    with refused("those of vmap"):
        torch.func.vmap(ga.distributed(ga.Sum(nonfinite="propagate")))(torch.ones(2, 3, 4))
    for engine in ("streamed", "matrix_free"):
        run = lambda engine=engine: ga.aggregate_gradients(  # noqa: E731 # its only use is a call
            loss_of, PARAMS, x["query"], spread, engine=engine
        )
        with_message(run, "rank")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
