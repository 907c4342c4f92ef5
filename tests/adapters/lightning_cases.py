"""A Lightning module with a task a batch, one with all of them, and the loop without Lightning."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from gradagree_opt.adapters.lightning import AgreementCallback, ManualTaskBatch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradagree_opt as ga
from gradagree_testing.configurations import CONFIGURATIONS

TASKS = 4
RATE = 0.1
CLIP = 0.05
SOME = ("paper", "mean", "cosine-True-keep-l1", "equal")
PRECISIONS = {"32-true": torch.float32, "64-true": torch.float64}
FILTERS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]
"""What Lightning warns of in runs as small and short as these."""
each_configuration = pytest.mark.parametrize(
    "configuration", [c for c in CONFIGURATIONS if c.name in SOME], ids=str
)


class Automatic(pl.LightningModule):
    """Regression whose every training batch is one task; records what its hooks see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.unused = nn.Linear(2, 2)
        self.skipped: tuple[int, ...] = ()
        self.stepped: list[dict[str, Tensor]] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return None if batch_idx in self.skipped else self.loss(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.stepped.append(gradients(self))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Manual(Automatic):
    """The same tasks, all of them in one training batch."""

    def __init__(self, aggregator: ga.Aggregator, **options: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.aggregator = aggregator
        self.options = options
        self.results: list[ga.Aggregation] = []
        self.backward_hooks: list[str] = []
        self.clip = CLIP

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        tasks = ManualTaskBatch(self, self.aggregator, **self.options)
        for x, y in zip(*batch, strict=True):
            tasks.add(self.loss([x, y]))
        self.results.append(tasks.backward())
        self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_before_backward(self, loss: Tensor) -> None:
        self.backward_hooks.append("before")

    def on_after_backward(self) -> None:
        self.backward_hooks.append("after")


class Recorder(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append(metrics)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def data(tasks: int, *, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Unequal tasks, some of which disagree."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(tasks, 5, 3, generator=draws, dtype=torch.float64)
    slopes = torch.randn(tasks, 3, 1, generator=draws, dtype=torch.float64)
    return TensorDataset(x.to(dtype), (x @ slopes).to(dtype))


def one_task_a_batch(dataset: TensorDataset) -> DataLoader:
    return DataLoader(dataset, batch_size=None)


def trainer(**options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **options})


def fit(
    module: pl.LightningModule, aggregator: ga.Aggregator | None, tasks: int, **options: Any
) -> pl.LightningModule:
    callbacks = [] if aggregator is None else [AgreementCallback(aggregator)]
    dtype = torch.float64 if options.get("precision") == "64-true" else torch.float32
    options = {"accumulate_grad_batches": TASKS, "callbacks": callbacks, **options}
    trainer(**options).fit(module, one_task_a_batch(data(tasks, dtype=dtype)))
    return module


def stacked(module: Automatic, tasks: list[list[Tensor]]) -> dict[str, Tensor]:
    """True gradient of each task at the module's parameters, in a loop, without Lightning."""
    each = []
    for task in tasks:
        module.zero_grad()
        module.loss(task).backward()
        each.append(gradients(module))
    return {name: torch.stack([gradient[name] for gradient in each]) for name in each[0]}


def by_hand(
    module: Automatic,
    aggregate: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    windows: list[list[list[Tensor]]],
    change: Callable[[nn.Module], object] = lambda module: None,
) -> Automatic:
    module = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    for window in windows:
        update = aggregate(stacked(module, window))
        module.zero_grad()
        for name, parameter in module.named_parameters():
            parameter.grad = update.get(name)
        change(module)
        optimizer.step()
    return module


def clip(module: nn.Module) -> None:
    nn.utils.clip_grad_norm_(module.parameters(), CLIP)


def windows_of(dataset: TensorDataset, *sizes: int) -> list[list[list[Tensor]]]:
    tasks = iter([list(task) for task in dataset])
    return [[next(tasks) for _ in range(size)] for size in sizes]


def assert_same(found: nn.Module, expected: nn.Module, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(
        dict(found.named_parameters()),
        dict(expected.named_parameters()),
        rtol=tolerance,
        atol=tolerance,
    )


def half_precision(**scaler: Any) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))


@contextmanager
def no_process_group_left() -> Iterator[None]:
    """Lightning keeps that of a DDP strategy until the process ends."""
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
