"""Programs of frameworks: TorchJD's weightings, Accelerate's wrappers, higher's and others'."""

import os
import sys
from functools import partial
from typing import Any

import torch
from common import RANK, WORLD, Model, check_close, check_same_bits, join, leave, refused, trained
from torch import Tensor, nn

import gradagree_opt as ga


def weightings_of_torchjd() -> None:
    """Random weights of the global generator, whose seeds differ: the first rank's are of all."""
    from gradagree_opt.adapters.torchjd import from_torchjd
    from torchjd.aggregation import Random, UPGrad

    torch.manual_seed(0)
    stack, one = torch.randn(2 * WORLD, 9), from_torchjd(UPGrad())
    wanted = one(stack)
    torch.manual_seed(0)
    random = from_torchjd(Random()).aggregate(stack)
    join()
    check_close(ga.distributed(one)(ga.own_share(stack)), wanted, 1e-4)
    torch.manual_seed(RANK)
    found = ga.distributed(from_torchjd(Random())).aggregate(ga.own_share(stack))
    check_close(found.weights, ga.own_share(random.weights))
    check_close(found.update, random.update)
    check_same_bits(found.update)


def models_of_accelerate() -> None:
    """Models and optimizers that Accelerate has prepared, beside a plain loop over all tasks."""
    from accelerate import Accelerator

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    torch.manual_seed(1)
    tasks, clip = torch.randn(3, 4, 3), nn.utils.clip_grad_norm_
    each = [(one, by) for one in (ga.EqualAgreement(), ga.Mean()) for by in (False, True)]
    wanted = [trained(model(), one, [*tasks], by, clip=clip)[0] for one, by in each]
    join()
    ranks, worlds = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")  # torchrun says both
    os.environ |= dict.fromkeys(ranks, str(RANK)) | dict.fromkeys(worlds, str(WORLD))
    accelerator, mine = Accelerator(cpu=True), [*ga.own_share(tasks)]
    assert accelerator.num_processes == WORLD
    for (one, by), whole in zip(each, wanted, strict=True):
        prepare, clip = accelerator.prepare, accelerator.clip_grad_norm_
        found, _ = trained(model(), ga.distributed(one), mine, by, prepare, clip)
        check_close(found, whole, 1e-5)
        check_same_bits(found)


def learners_of_higher() -> None:
    """Its meta-step by an adapter, of two tasks on one rank and of one on the other."""
    from gradagree_opt.adapters.higher import meta_step

    def filled(aggregator: Any, tasks: Tensor) -> list[Tensor | None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        inner = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss(model: Any, x: Tensor) -> Tensor:
            result: Tensor = model(x).square().mean()
            return result

        meta_step(model, inner, loss, {"support": tasks, "query": tasks}, aggregator)
        return [p.grad for p in model.parameters()]

    torch.manual_seed(1)
    tasks, one = torch.randn(3, 4, 3), ga.GradientAgreement()
    wanted = filled(one, tasks)
    join()
    found = filled(ga.distributed(one), ga.own_share(tasks))
    check_close(found, wanted, 1e-5)
    check_same_bits(found)
    found = filled(ga.distributed(one), tasks[: 0 if RANK else 3])
    check_close(found, wanted, 1e-5)
    check_same_bits(found)
    with refused("none on any rank"):
        filled(ga.distributed(one), tasks[:0])


def learners_of_learn2learn() -> None:
    """Its meta-step on ranks with heads of their own, beside a loop over all tasks."""
    from gradagree_opt.adapters.learn2learn import meta_step
    from learn2learn.algorithms import MAML

    def learner() -> MAML:
        torch.manual_seed(0)
        return MAML(Model(), lr=0.1, allow_unused=True)

    def loss(learner: Any, task: Tensor, *, head: int) -> Tensor:
        result: Tensor = learner(task, head).square().mean()
        return result

    torch.manual_seed(1)
    tasks, maml = torch.randn(3, 4, 3), learner()
    batch = ga.TaskBatch(maml, ga.GradientAgreement())
    for task, head in zip(tasks, (0, 0, 1), strict=True):  # as two ranks have them
        adapted = maml.clone()
        adapted.adapt(loss(adapted, task, head=head))
        batch.add(loss(adapted, task, head=head), adapted=adapted)
    batch.backward()
    wanted = {name: p.grad for name, p in maml.named_parameters() if p.grad is not None}

    def filled(aggregator: Any, count: int) -> Any:
        maml, share = learner(), tasks[:count]
        both = {"support": share, "query": share}
        losses = meta_step(maml, partial(loss, head=0), both, aggregator).losses
        return {n: p.grad for n, p in maml.named_parameters() if p.grad is not None}, losses

    each = (ga.EqualAgreement(), ga.GradientAgreement())
    alone = [filled(one, 3)[0] for one in each]
    join()
    dropping = ga.GradientAgreement(nonfinite="drop")
    spoilt = torch.cat([tasks, torch.full_like(tasks[:1], torch.nan)])  # on the second rank
    for one, drawn in ((ga.GradientAgreement(), tasks), (dropping, spoilt)):
        share, maml = drawn[2:] if RANK else drawn[:2], learner()
        both = {"support": share, "query": share}
        meta_step(maml, partial(loss, head=RANK), both, ga.distributed(one))
        found = {name: p.grad for name, p in maml.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        check_close(found, wanted, 1e-5)
        check_same_bits(found)
    for one, whole in zip(each, alone, strict=True):
        found, losses = filled(ga.distributed(one), 0 if RANK else 3)
        assert found.keys() == whole.keys() and len(losses) == (0 if RANK else 3)
        check_close(found, whole, 1e-5)
        check_same_bits(found)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
