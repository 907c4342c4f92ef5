"""Lightning and Fabric over ranks, whose processes torchrun could have started."""

import copy
import os
import sys
from typing import Any

import torch
from common import RANK, STORE, WORLD, check_close, check_same_bits, leave, with_message

os.environ |= {"LOCAL_RANK": str(RANK), "MASTER_ADDR": "127.0.0.1"}
os.environ |= {"MASTER_PORT": STORE.rsplit("-", 1)[1]}

import lightning.pytorch as pl  # the environment beforehand
from gradagree_opt.adapters.lightning import AgreementCallback, ManualTaskBatch
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gradagree_opt as ga

TASKS = 4
"""Of a step, those of all ranks together."""
AGGREGATORS = (
    ga.GradientAgreement(),
    ga.GradientAgreement(similarity="cosine", match_norm="mean"),
    ga.EqualAgreement(),
    ga.Mean(),
)


class Automatic(pl.LightningModule):
    """A training batch is a task, which uses one head: each rank has heads of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(WORLD + 1))
        self.means: list[Tensor] = []

    def loss(self, x: Tensor, y: Tensor, head: Tensor) -> Tensor:
        return mse_loss(self.heads[int(head)](self.trunk(x)), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.means.append(self.trunk[1].running_mean.clone())
        return self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class Manual(Automatic):
    """The tasks of a step, of which a rank takes its uneven share, in one training batch."""

    def __init__(self, aggregator: ga.Aggregator, *, shares: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.aggregator = aggregator
        self.shares = shares

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        tasks = ManualTaskBatch(self, self.aggregator)
        batch = [each[:3] for each in batch]
        for x, y, head in zip(*(ga.own_share(batch) if self.shares else batch), strict=True):
            tasks.add(self.loss(x, y, head))
        tasks.backward()
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()


def dataset() -> TensorDataset:
    """Task i of a step goes to rank i % WORLD, as DistributedSampler deals it, and so its head."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(3 * TASKS, 5, 3, generator=draws)
    y = x @ torch.randn(3 * TASKS, 3, 1, generator=draws)
    return TensorDataset(x, y, torch.arange(3 * TASKS) % WORLD)


def trainer(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    options = {"devices": 1, "max_epochs": 2, **dict.fromkeys(quiet, False), **options}
    return pl.Trainer(accelerator="cpu", callbacks=callbacks, **options)


def automatic(aggregator: ga.Aggregator, **options: Any) -> Automatic:
    """Lightning's own sampler would shuffle where it is DistributedSampler."""
    model, sampler = Automatic(), None
    if aggregator.ranks is not None:
        sampler = DistributedSampler(dataset(), WORLD, RANK, shuffle=False)
    loader = DataLoader(dataset(), batch_size=None, sampler=sampler)
    trainer([AgreementCallback(aggregator)], **options).fit(model, loader)
    return model


def lightning() -> None:
    """AgreementCallback under strategy="ddp": three windows of two epochs, clipped, two kinds."""
    one = [
        automatic(each, accumulate_grad_batches=TASKS, gradient_clip_val=0.5)
        for each in AGGREGATORS
    ]
    wanted_mixed = automatic(
        ga.Mean(nonfinite="propagate"), accumulate_grad_batches=TASKS, precision="bf16-mixed"
    )
    options = {"devices": WORLD, "strategy": "ddp", "accumulate_grad_batches": TASKS // WORLD}
    for aggregator, wanted in zip(AGGREGATORS, one, strict=True):
        spread = ga.distributed(aggregator)
        found = automatic(spread, gradient_clip_val=0.5, **options)
        check_close([*found.parameters()], [*wanted.parameters()], 1e-3)
        check_same_bits([*found.parameters()])
        check_same_bits(found.means[:: TASKS // WORLD])  # sent with the first task of a step
        assert not torch.equal(found.heads[WORLD - 1].weight, Automatic().heads[WORLD - 1].weight)
        assert torch.equal(found.heads[WORLD].weight, Automatic().heads[WORLD].weight)
    found = automatic(
        ga.distributed(ga.Mean(nonfinite="propagate")), precision="bf16-mixed", **options
    )
    check_close([*found.parameters()], [*wanted_mixed.parameters()], 1e-2)
    check_same_bits([*found.parameters()])
    with_message(lambda: automatic(ga.Mean(), **options), "ga.distributed")
    static = options | {"strategy": DDPStrategy(static_graph=True)}
    with_message(lambda: automatic(ga.distributed(ga.Mean()), **static), "static_graph")


def a_task_for_each_device() -> None:
    """Without accumulation a step has the tasks of all ranks."""
    wanted = automatic(ga.EqualAgreement(), accumulate_grad_batches=WORLD)
    options = {"devices": WORLD, "strategy": "ddp"}
    found = automatic(ga.distributed(ga.EqualAgreement()), **options)
    check_close([*found.parameters()], [*wanted.parameters()], 1e-3)
    check_same_bits([*found.parameters()])


def manual(aggregator: ga.Aggregator, *, shares: bool = False, **options: Any) -> Manual:
    model = Manual(aggregator, shares=shares)
    loader = DataLoader(dataset(), batch_size=TASKS)
    trainer([], use_distributed_sampler=False, **options).fit(model, loader)
    return model


def lightning_manual() -> None:
    """ManualTaskBatch under strategy="ddp", of ranks with two tasks and with one."""
    one = [manual(each) for each in AGGREGATORS]
    for aggregator, wanted in zip(AGGREGATORS, one, strict=True):
        spread = ga.distributed(aggregator)
        found = manual(spread, shares=True, devices=WORLD, strategy="ddp")
        check_close([*found.parameters()], [*wanted.parameters()], 1e-3)
        check_same_bits([*found.parameters()])


def fabric() -> None:
    """TaskBatch of what Fabric has set up by strategy="ddp", uneven tasks."""
    x, y, heads = dataset()[:3]
    start = Automatic()
    start.trunk[1] = nn.Identity()

    def steps(model: Any, optimizer: Any, call: Any, aggregator: Any, tasks: Any) -> None:
        for _ in range(3):
            batch = ga.TaskBatch(model, aggregator)
            for a, b, head in zip(*tasks, strict=True):
                batch.add(call(a, b, head))
            batch.backward()
            optimizer.step()
            optimizer.zero_grad()

    wanted = copy.deepcopy(start)
    adam = torch.optim.Adam(wanted.parameters(), lr=0.05)
    steps(wanted, adam, wanted.loss, ga.EqualAgreement(), (x, y, heads))
    lit = Fabric(accelerator="cpu", devices=WORLD, strategy="ddp")
    lit.launch()
    model = copy.deepcopy(start)
    wrapped, adam = lit.setup(model, torch.optim.Adam(model.parameters(), lr=0.05))
    wrapped.mark_forward_method("loss")
    tasks = ga.own_share((x, y, heads))
    steps(wrapped, adam, wrapped.loss, ga.distributed(ga.EqualAgreement()), tasks)
    check_close([*model.parameters()], [*wanted.parameters()], 1e-3)
    check_same_bits([*model.parameters()])


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    leave()
