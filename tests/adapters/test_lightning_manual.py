"""ManualTaskBatch in the training_step of the real Trainer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradagree_opt as ga
from gradagree_testing.configurations import PAPER, Configuration

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from gradagree_opt.adapters.lightning import ManualTaskBatch  # noqa: E402

from .lightning_cases import (  # noqa: E402
    FILTERS,
    PRECISIONS,
    RATE,
    TASKS,
    Automatic,
    Manual,
    Recorder,
    assert_same,
    by_hand,
    clip,
    data,
    each_configuration,
    half_precision,
    no_process_group_left,
    stacked,
    trainer,
    windows_of,
)

pytestmark = FILTERS


def manual(module: Manual, tasks: int = TASKS, **options: Any) -> Manual:
    dtype = torch.float64 if options.get("precision") == "64-true" else torch.float32
    loader = DataLoader(data(tasks, dtype=dtype), batch_size=TASKS)
    trainer(**options).fit(module, loader)
    return module


@pytest.mark.parametrize("memory", ["graph", "stream"])
@each_configuration
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_manual_batch_steps_on_the_clipped_aggregation(
    configuration: Configuration, memory: str, precision: str
) -> None:
    dtype = PRECISIONS[precision]
    windows = windows_of(data(8, dtype=dtype), TASKS, TASKS)
    expected = by_hand(Automatic().to(dtype), configuration.combine, windows, clip)
    found = manual(Manual(configuration.make(), memory=memory), tasks=8, precision=precision)
    assert_same(found, expected, configuration.tolerance(dtype))


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

    first_order = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        params = dict(self.net.named_parameters())
        tasks = ManualTaskBatch(self, self.aggregator, parameters=self.net)
        for x, y in zip(*batch, strict=True):
            inner = self.functional_loss(params, (x[:2], y[:2]))
            second_order = not self.first_order
            grads = torch.autograd.grad(inner, list(params.values()), create_graph=second_order)
            fast = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
            tasks.add(self.functional_loss(fast, (x[2:], y[2:])), adapted=fast)
        self.optimizers().zero_grad()
        self.results.append(tasks.backward())
        self.optimizers().step()

    def functional_loss(self, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(torch.func.functional_call(self.net, params, (x,)), y)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_maml_in_a_manual_training_step_is_our_maml(first_order: bool, precision: str) -> None:
    dtype = PRECISIONS[precision]
    module = ManualMAML(ga.GradientAgreement())
    module.first_order = first_order
    manual(module, precision=precision)
    start = ManualMAML(ga.GradientAgreement()).to(dtype)
    x, y = data(4, dtype=dtype).tensors
    tasks = {"support": (x[:, :2], y[:, :2]), "query": (x[:, 2:], y[:, 2:])}
    inner = ga.InnerSGD(lr=0.1, steps=1)
    maml = ga.MAML(start.functional_loss, inner, first_order=first_order)
    params = {name: p.detach() for name, p in start.net.named_parameters()}
    expected = maml.step(params, tasks, ga.GradientAgreement())
    (found,) = module.results
    close = dict.fromkeys(("rtol", "atol"), PAPER.tolerance(dtype))
    torch.testing.assert_close(found.weights, expected.weights, **close)
    torch.testing.assert_close(found.update, expected.update, **close)


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


def test_the_length_of_the_update_is_logged_without_a_grad_scalers_scale() -> None:
    logger = Recorder()
    aggregator = ga.GradientAgreement(nonfinite="propagate")
    scaler = half_precision(init_scale=1024.0)
    manual(Manual(aggregator), plugins=[scaler], logger=logger, log_every_n_steps=1)
    expected = aggregator.aggregate(stacked(Automatic(), windows_of(data(4), TASKS)[0])).diagnostics
    (logged,) = logger.logged
    assert logged["agreement/update_norm"] == pytest.approx(expected.log()["update_norm"], rel=2e-2)


def test_a_manual_batch_refuses_automatic_optimization() -> None:
    with pytest.raises(ValueError, match="take AgreementCallback"):
        ManualTaskBatch(Automatic(), ga.Mean())


@pytest.mark.usefixtures("without_type_checks")
def test_a_manual_batch_takes_the_module_not_a_part_of_it() -> None:
    with pytest.raises(TypeError, match="found Linear; give self, and a part of it as"):
        ManualTaskBatch(nn.Linear(2, 2), ga.Mean())


def test_a_manual_batch_refuses_ddp() -> None:
    with no_process_group_left(), pytest.raises(ValueError, match="found DDPStrategy"):
        manual(Manual(ga.Mean()), strategy="ddp", devices=1)


@pytest.mark.parametrize("module", [Automatic, lambda: Manual(ga.Mean())], ids=["auto", "manual"])
def test_a_task_optimizer_in_the_place_of_its_own_is_refused(module: Callable[[], Any]) -> None:
    of_tasks = module()
    own = of_tasks.configure_optimizers
    of_tasks.configure_optimizers = lambda: ga.TaskOptimizer(own(), ga.Mean())
    with pytest.raises(TypeError, match="found TaskOptimizer; return the wrapped one from conf"):
        manual(of_tasks)
