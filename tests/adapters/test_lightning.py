import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradagree_opt as ga

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from gradagree_opt.adapters.lightning import AgreementCallback, ManualTaskBatch  # noqa: E402
from lightning.pytorch.callbacks import GradientAccumulationScheduler  # noqa: E402
from lightning.pytorch.loggers.logger import DummyLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]

TASKS = 4
RATE = 0.1
CLIP = 0.05
AGGREGATORS = [ga.GradientAgreement(), ga.Mean(), ga.GradientAgreement(similarity="cosine")]


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
    aggregator: ga.Aggregator,
    windows: list[list[list[Tensor]]],
    change: Callable[[nn.Module], object] = lambda module: None,
) -> Automatic:
    module = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    for window in windows:
        update = aggregator(stacked(module, window))
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


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=["agreement", "mean", "cosine"])
@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("32-true", torch.float32, 1e-6), ("64-true", torch.float64, 1e-12)],
)
def test_accumulated_steps_are_the_aggregators_tasks(
    aggregator: ga.Aggregator, precision: str, dtype: torch.dtype, tolerance: float
) -> None:
    start = Automatic().to(dtype)
    expected = by_hand(start, aggregator, windows_of(data(8, dtype=dtype), TASKS, TASKS))
    found = fit(Automatic(), aggregator, tasks=8, precision=precision)
    assert_same(found, expected, tolerance)


def test_mean_is_lightnings_own_accumulation() -> None:
    own = fit(Automatic(), None, tasks=8)
    ours = fit(Automatic(), ga.Mean(), tasks=8)
    assert_same(ours, own)
    torch.testing.assert_close(ours.stepped, own.stepped, rtol=1e-6, atol=1e-6)


def test_mean_is_lightnings_own_accumulation_in_bfloat16_autocast() -> None:
    own = fit(Automatic(), None, tasks=8, precision="bf16-mixed")
    ours = fit(Automatic(), ga.Mean(), tasks=8, precision="bf16-mixed")
    assert_same(ours, own)


def test_a_window_cut_short_is_aggregated_over_its_own_tasks() -> None:
    expected = by_hand(Automatic(), ga.GradientAgreement(), windows_of(data(6), TASKS, 2))
    assert_same(fit(Automatic(), ga.GradientAgreement(), tasks=6), expected)


def test_windows_start_anew_in_every_epoch() -> None:
    windows = windows_of(data(6), TASKS, 2)
    expected = by_hand(Automatic(), ga.GradientAgreement(), windows + windows)
    assert_same(fit(Automatic(), ga.GradientAgreement(), tasks=6, max_epochs=2), expected)


def test_limit_train_batches_cuts_a_window_short() -> None:
    expected = by_hand(Automatic(), ga.GradientAgreement(), windows_of(data(8), TASKS, 2))
    found = fit(Automatic(), ga.GradientAgreement(), tasks=8, limit_train_batches=6)
    assert_same(found, expected)


def test_a_window_left_at_an_epochs_early_end_is_forgotten() -> None:
    class Leaves(Automatic):
        def on_train_batch_start(self, batch: object, batch_idx: int) -> int | None:
            return -1 if batch_idx == 6 and self.current_epoch == 0 else None

    first, second = windows_of(data(8), TASKS, TASKS)
    expected = by_hand(Automatic(), ga.GradientAgreement(), [first, first, second])
    assert_same(fit(Leaves(), ga.GradientAgreement(), tasks=8, max_epochs=2), expected)


@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_a_training_step_that_returns_none_is_no_task(skipped: int) -> None:
    module = Automatic()
    module.skipped = (skipped,)
    tasks = [list(task) for index, task in enumerate(data(4)) if index != skipped]
    expected = by_hand(Automatic(), ga.GradientAgreement(), [tasks])
    assert_same(fit(module, ga.GradientAgreement(), tasks=4), expected)


def test_the_aggregation_is_clipped_not_the_tasks() -> None:
    windows = windows_of(data(8), TASKS, TASKS)
    expected = by_hand(Automatic(), ga.GradientAgreement(), windows, clip)
    found = fit(Automatic(), ga.GradientAgreement(), tasks=8, gradient_clip_val=CLIP)
    assert_same(found, expected)


def test_the_number_of_tasks_may_change_between_epochs() -> None:
    callback = AgreementCallback(ga.GradientAgreement())
    schedule = GradientAccumulationScheduler({0: 1, 1: 4})
    module = Automatic()
    fit(module, None, 4, callbacks=[callback, schedule], accumulate_grad_batches=1, max_epochs=2)
    windows = windows_of(data(4), 1, 1, 1, 1) + windows_of(data(4), 4)
    assert_same(module, by_hand(Automatic(), ga.GradientAgreement(), windows))


def test_frozen_and_unused_parameters_keep_no_gradient() -> None:
    module = Automatic()
    module.net[0].bias.requires_grad_(False)
    fit(module, ga.GradientAgreement(), tasks=4)
    (stepped,) = module.stepped
    assert set(stepped) == {"net.0.weight", "net.2.weight", "net.2.bias"}


def test_a_parameter_that_only_some_tasks_use_has_a_zero_gradient_in_the_others() -> None:
    class Headed(Automatic):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + self.unused.weight.square().sum() if batch_idx == 0 else loss

    start = Automatic()
    stack = stacked(start, windows_of(data(4), 4)[0])
    stack["unused.weight"] = torch.zeros(4, 2, 2)
    stack["unused.weight"][0] = 2 * start.unused.weight.detach()
    module = fit(Headed(), ga.GradientAgreement(), tasks=4)
    expected = ga.GradientAgreement()(stack)
    torch.testing.assert_close(module.stepped[0], expected, rtol=1e-6, atol=1e-6)


def test_every_task_is_seen_alone_by_the_hook_after_its_backward() -> None:
    class Watched(Automatic):
        def on_after_backward(self) -> None:
            self.watched.append(gradients(self))

    module = Watched()
    module.watched = []
    expected = stacked(Automatic(), windows_of(data(4), 4)[0])
    fit(module, ga.GradientAgreement(), tasks=4)
    for index, seen in enumerate(module.watched[:3]):
        alone = {name: stack[index] / TASKS for name, stack in expected.items()}
        torch.testing.assert_close(seen, alone)


def test_weights_of_the_last_window_are_kept() -> None:
    callback = AgreementCallback(ga.GradientAgreement())
    fit(Automatic(), None, 4, callbacks=[callback])
    stack = stacked(Automatic(), windows_of(data(4), 4)[0])
    torch.testing.assert_close(callback.weights, ga.agreement_weights(stack))


def half_precision(**scaler: Any) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))


def test_a_grad_scalers_scale_is_undone_once() -> None:
    aggregator = ga.GradientAgreement(nonfinite="propagate")
    found = fit(Automatic(), aggregator, tasks=4, plugins=[half_precision(init_scale=1024.0)])
    start = Automatic()
    with torch.autocast("cpu", torch.float16):
        stack = stacked(start, windows_of(data(4), 4)[0])
    expected = aggregator(stack)
    torch.testing.assert_close(found.stepped[0], expected, rtol=2e-2, atol=1e-3)


def test_a_grad_scaler_skips_the_step_when_any_task_overflows() -> None:
    plugin = half_precision(init_scale=2.0**40)
    found = fit(Automatic(), ga.GradientAgreement(nonfinite="propagate"), 4, plugins=[plugin])
    assert_same(found, Automatic(), tolerance=0)
    assert plugin.scaler.get_scale() == 2.0**39


def test_diagnostics_reach_the_modules_logger() -> None:
    logger = Recorder()
    fit(Automatic(), ga.GradientAgreement(), tasks=8, logger=logger, log_every_n_steps=1)
    stack = stacked(Automatic(), windows_of(data(8), 4)[0])
    expected = ga.GradientAgreement().aggregate(stack).diagnostics.log()
    assert len(logger.logged) == 2
    for name, value in expected.items():
        assert logger.logged[0][f"agreement/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6)


def refused(match: str, module: pl.LightningModule, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        fit(module, ga.GradientAgreement(), tasks=4, **options)


def test_one_task_a_step_is_refused() -> None:
    refused("accumulate_grad_batches=N", Automatic(), accumulate_grad_batches=1)


def test_the_callback_refuses_manual_optimization() -> None:
    refused("use ManualTaskBatch", Manual(ga.Mean()), accumulate_grad_batches=1)


def test_ddp_is_refused() -> None:
    refused("found DDPStrategy", Automatic(), strategy="ddp", devices=1)


def test_a_grad_scaler_is_refused_where_its_overflows_would_raise() -> None:
    refused("nonfinite='propagate'", Automatic(), plugins=[half_precision()])


def test_an_optimizer_that_calls_its_closure_again_is_refused() -> None:
    module = Automatic()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.net.parameters())
    refused("LBFGS calls its closure again", module)


@pytest.mark.usefixtures("without_type_checks")
def test_the_trainer_of_the_other_distribution_is_refused() -> None:
    other = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

    class Other(other.LightningModule):
        automatic_optimization = True

    callback = AgreementCallback(ga.Mean())
    foreign = other.Trainer(accumulate_grad_batches=2, accelerator="cpu", logger=False)
    with pytest.raises(TypeError, match="import lightning"):
        callback.setup(foreign, Other(), "fit")


def manual(module: Manual, tasks: int = TASKS, **options: Any) -> Manual:
    dtype = torch.float64 if options.get("precision") == "64-true" else torch.float32
    loader = DataLoader(data(tasks, dtype=dtype), batch_size=TASKS)
    trainer(**options).fit(module, loader)
    return module


@pytest.mark.parametrize("memory", ["graph", "stream"])
@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=["agreement", "mean", "cosine"])
@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("32-true", torch.float32, 1e-6), ("64-true", torch.float64, 1e-12)],
)
def test_a_manual_batch_steps_on_the_clipped_aggregation(
    aggregator: ga.Aggregator, memory: str, precision: str, dtype: torch.dtype, tolerance: float
) -> None:
    windows = windows_of(data(8, dtype=dtype), TASKS, TASKS)
    expected = by_hand(Automatic().to(dtype), aggregator, windows, clip)
    found = manual(Manual(aggregator, memory=memory), tasks=8, precision=precision)
    assert_same(found, expected, tolerance)


class ManualMean(Manual):
    """What Lightning's users write: manual_backward of the mean loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        losses = [self.loss([x, y]) for x, y in zip(*batch, strict=True)]
        self.manual_backward(torch.stack(losses).mean())
        self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param(dict, 1e-6, id="float32"),
        # Half the digits: here the gradient of every task is rounded by itself.
        pytest.param(lambda: {"precision": "bf16-mixed"}, 1e-2, id="bfloat16"),
        pytest.param(lambda: {"plugins": [half_precision(init_scale=1024.0)]}, 1e-3, id="scaled"),
    ],
)
def test_a_manual_mean_is_manual_backward_of_the_mean(
    options: Callable[[], dict[str, Any]], tolerance: float
) -> None:
    aggregator = ga.Mean(nonfinite="propagate")
    ours, own = Manual(aggregator), ManualMean(aggregator)
    ours.clip = own.clip = 0.0
    (found,), (expected,) = manual(ours, **options()).stepped, manual(own, **options()).stepped
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)


def test_hooks_run_around_the_manual_backward() -> None:
    module = manual(Manual(ga.GradientAgreement()))
    assert module.backward_hooks == ["before"] * TASKS + ["after"]


def test_manual_diagnostics_are_logged_under_the_batchs_name() -> None:
    logger = Recorder()
    module = Manual(ga.GradientAgreement(), name="critic")
    manual(module, logger=logger, log_every_n_steps=1)
    expected = module.results[0].diagnostics.log()
    (logged,) = logger.logged
    for name, value in expected.items():
        assert logged[f"critic/{name}"] == pytest.approx(value, rel=1e-6)


class TwoOptimizers(Manual):
    """One batch for each of two parts, in turn."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer, part in zip(self.optimizers(), (self.net[0], self.net[2]), strict=True):
            optimizer.zero_grad()
            tasks = ManualTaskBatch(self, self.aggregator, parameters=part)
            for x, y in zip(*batch, strict=True):
                tasks.add(self.loss([x, y]))
            tasks.backward()
            self.clip_gradients(optimizer, gradient_clip_val=10, gradient_clip_algorithm="value")
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[i].parameters(), lr=RATE) for i in (0, 2)]


def test_each_of_two_optimizers_steps_on_the_agreement_about_its_own_part() -> None:
    aggregator = ga.GradientAgreement()
    (tasks,) = windows_of(data(4), 4)
    expected = Automatic()
    for index in (0, 2):
        stack = stacked(expected, tasks)
        own = {name: g for name, g in stack.items() if name.startswith(f"net.{index}.")}
        update = aggregator(own)
        for name, parameter in expected.named_parameters():
            if name in update:
                parameter.data -= RATE * update[name]
    assert_same(manual(TwoOptimizers(aggregator)), expected)


class ManualMAML(Manual):
    """One inner step, functional, on the first examples of a task."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        params = dict(self.net.named_parameters())
        tasks = ManualTaskBatch(self, self.aggregator, parameters=self.net)
        for x, y in zip(*batch, strict=True):
            inner = self.functional_loss(params, (x[:2], y[:2]))
            grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
            fast = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
            tasks.add(self.functional_loss(fast, (x[2:], y[2:])), adapted=fast)
        self.optimizers().zero_grad()
        self.results.append(tasks.backward())
        self.optimizers().step()

    def functional_loss(self, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(torch.func.functional_call(self.net, params, (x,)), y)


def test_maml_in_a_manual_training_step_is_our_maml() -> None:
    module = manual(ManualMAML(ga.GradientAgreement()), precision="64-true")
    start = ManualMAML(ga.GradientAgreement()).double()
    x, y = data(4, dtype=torch.float64).tensors
    tasks = {"support": (x[:, :2], y[:, :2]), "query": (x[:, 2:], y[:, 2:])}
    maml = ga.MAML(start.functional_loss, ga.InnerSGD(lr=0.1, steps=1))
    params = {name: p.detach() for name, p in start.net.named_parameters()}
    expected = maml.step(params, tasks, ga.GradientAgreement())
    (found,) = module.results
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.update, expected.update, rtol=1e-12, atol=1e-12)


def test_the_reptile_form_runs_no_backward_hooks_and_is_refused_under_a_grad_scaler() -> None:
    class ManualReptile(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            tasks = ManualTaskBatch(self, self.aggregator, parameters=self.net)
            for step in (0.5, 1.0):
                tasks.add(adapted=[p.detach() - step for p in self.net.parameters()])
            self.results.append(tasks.backward())
            self.optimizers().step()

    module = manual(ManualReptile(ga.Mean()))
    assert module.backward_hooks == []
    torch.testing.assert_close(module.results[0].update["0.weight"], torch.full((8, 3), 0.75))
    with pytest.raises(ValueError, match="nothing to scale in the Reptile form"):
        manual(ManualReptile(ga.Mean(nonfinite="propagate")), plugins=[half_precision()])


def test_a_manual_batch_refuses_automatic_optimization() -> None:
    with pytest.raises(ValueError, match="take AgreementCallback"):
        ManualTaskBatch(Automatic(), ga.Mean())


def test_a_manual_batch_refuses_ddp() -> None:
    with pytest.raises(ValueError, match="found DDPStrategy"):
        manual(Manual(ga.Mean()), strategy="ddp", devices=1)


@pytest.fixture(autouse=True)
def no_process_group_left_behind() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
