"""Programs of loops and functional steps, beside those of one process."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from common import (
    MODEL,
    PARAMS,
    RANK,
    WORLD,
    Model,
    check_close,
    check_same_bits,
    join,
    leave,
    loss_of,
    own,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

import gradagree_opt as ga


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


def adapting_in_bfloat16() -> None:
    """Learners in bfloat16 of a model in float32, beside a rank without tasks: as one process."""
    torch.manual_seed(5)
    tasks = torch.randn(3, 4, 3)

    def step(aggregator: Any, tasks: Tensor, form: str, memory: str) -> list[Any]:
        torch.manual_seed(1)
        model = Model()
        batch = ga.TaskBatch(model, aggregator, memory=memory)
        for task in tasks:
            adapted = {n: ((1 - task.mean()) * p).bfloat16() for n, p in model.named_parameters()}
            call = functional_call(model, adapted, (task.bfloat16(),))
            losses = [call.square().mean()] * ("loss" in form)
            batch.add(*losses, **{"adapted": adapted} if "adapted" in form else {})
        result = batch.backward()
        used = [p.grad for p in model.parameters() if p.grad is not None]
        return [used, result.update, result.diagnostics.update_norm]

    aggregators = (ga.GradientAgreement(), ga.EqualAgreement(), ga.Mean(match_norm="agreement"))
    forms = [(f, m) for f in ("loss", "adapted", "loss, adapted") for m in ("graph", "stream")]
    cases = [(one, *form) for one in aggregators for form in forms]
    expected = [step(one, tasks, *form) for one, *form in cases]
    join()
    for empty in range(WORLD):
        mine = tasks[:0] if empty == RANK else tasks
        for (one, *form), wanted in zip(cases, expected, strict=True):
            found = step(ga.distributed(one), mine, *form)
            check_close(found, wanted, 1e-4)
            check_same_bits(found)


def dropped_tasks() -> None:
    """A head that a dropped task alone uses keeps the ``.grad`` that it has, on every rank."""
    torch.manual_seed(5)
    tasks, model = torch.randn(2 * WORLD, 4, 3), Model()
    tasks[-1] = torch.nan

    def step(aggregator: Any, numbers: range, memory: str) -> list[Tensor | None]:
        batch = ga.TaskBatch(model, aggregator, memory=memory)
        for number in numbers:
            loss = model(tasks[number], head=2 if number == 2 * WORLD - 1 else 1).square().mean()
            batch.add(loss)
        model.zero_grad()
        batch.backward()
        return [p.grad for p in model.parameters()]

    one, memories = ga.GradientAgreement(nonfinite="drop"), ("graph", "stream")
    expected = [step(one, range(2 * WORLD), memory) for memory in memories]
    join()
    for memory, wanted in zip(memories, expected, strict=True):
        found = step(ga.distributed(one), range(2 * RANK, 2 * RANK + 2), memory)
        assert model.heads[2].weight.grad is None
        assert [each is None for each in found] == [each is None for each in wanted]
        check_close([a for a in found if a is not None], [a for a in wanted if a is not None])


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
