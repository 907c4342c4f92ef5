"""AgreementCallback under the real Trainer, against one backward pass after the other."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gradagree_opt as ga
from gradagree_testing.configurations import Configuration

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from gradagree_opt.adapters.lightning import AgreementCallback  # noqa: E402
from lightning.pytorch.callbacks import GradientAccumulationScheduler  # noqa: E402

from .lightning_cases import (  # noqa: E402
    CLIP,
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
    fit,
    gradients,
    half_precision,
    no_process_group_left,
    one_task_a_batch,
    stacked,
    trainer,
    windows_of,
)

pytestmark = FILTERS


@each_configuration
@pytest.mark.parametrize("precision", PRECISIONS)
def test_accumulated_steps_are_the_aggregators_tasks(
    configuration: Configuration, precision: str
) -> None:
    dtype = PRECISIONS[precision]
    windows = windows_of(data(8, dtype=dtype), TASKS, TASKS)
    expected = by_hand(Automatic().to(dtype), configuration.combine, windows)
    found = fit(Automatic(), configuration.make(), tasks=8, precision=precision)
    assert_same(found, expected, configuration.tolerance(dtype))


def test_mean_is_lightnings_own_accumulation() -> None:
    own = fit(Automatic(), None, tasks=8)
    ours = fit(Automatic(), ga.Mean(), tasks=8)
    assert_same(ours, own)
    torch.testing.assert_close(ours.stepped, own.stepped, rtol=1e-6, atol=1e-6)


def test_mean_is_lightnings_own_accumulation_in_bfloat16_autocast() -> None:
    own = fit(Automatic(), None, tasks=8, precision="bf16-mixed")
    ours = fit(Automatic(), ga.Mean(), tasks=8, precision="bf16-mixed")
    assert_same(ours, own)


def test_running_statistics_are_those_of_lightnings_own_accumulation() -> None:
    def normalised() -> Automatic:
        module = Automatic()
        module.net.insert(1, torch.nn.BatchNorm1d(8))
        return module

    own, ours = fit(normalised(), None, tasks=8), fit(normalised(), ga.Mean(), tasks=8)
    assert_same(ours, own)
    assert ours.net[1].num_batches_tracked == 8
    torch.testing.assert_close([*ours.buffers()], [*own.buffers()], rtol=1e-6, atol=1e-6)


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


@pytest.mark.usefixtures("without_type_checks")
def test_what_is_no_aggregator_is_refused() -> None:
    with pytest.raises(TypeError, match="found the class Mean; call it"):
        AgreementCallback(ga.Mean)


def test_one_task_a_step_is_refused() -> None:
    refused("accumulate_grad_batches=N", Automatic(), accumulate_grad_batches=1)


def test_the_callback_refuses_manual_optimization() -> None:
    refused("use ManualTaskBatch", Manual(ga.Mean()), accumulate_grad_batches=1)


def test_what_does_not_train_is_not_refused() -> None:
    class Tested(Manual):
        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

    callback = AgreementCallback(ga.Mean())
    module = Tested(ga.Mean())
    with torch.no_grad():
        expected = torch.stack([module.loss(list(task)) for task in data(3)]).mean()
    [found] = trainer(callbacks=[callback]).test(module, one_task_a_batch(data(3)), verbose=False)
    assert found["loss"] == pytest.approx(expected.item())


def test_two_callbacks_are_refused() -> None:
    callbacks = [AgreementCallback(ga.Mean()), AgreementCallback(ga.Mean())]
    refused("expected one AgreementCallback, found 2", Automatic(), callbacks=callbacks)


def test_a_loss_that_does_not_depend_on_the_parameters_is_refused_by_its_task() -> None:
    class Constant(Automatic):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return torch.ones((), requires_grad=True) * 2 if batch_idx == 1 else loss

    refused("found one for task 1 that depends on none of them", Constant())


def test_ddp_is_refused() -> None:
    with no_process_group_left():
        refused("found DDPStrategy", Automatic(), strategy="ddp", devices=1)


def test_a_grad_scaler_is_refused_where_its_overflows_would_raise() -> None:
    refused("nonfinite='propagate'", Automatic(), plugins=[half_precision()])


def test_an_optimizer_that_calls_its_closure_again_is_refused() -> None:
    module = Automatic()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.net.parameters())
    refused("LBFGS calls its closure again", module)


def test_a_step_within_the_backward_pass_is_refused_for_it_would_be_one_of_every_task() -> None:
    module = Automatic()
    module.net[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="see the gradient of every task by itself"):
        fit(module, ga.Mean(), tasks=8)
    torch.testing.assert_close(module.state_dict(), before)


class WithOwnPart(Automatic):
    """The third task is NaN, and alone uses ``unused``; or it is left out."""

    def __init__(self, skipped: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.skipped = skipped

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss = super().loss(batch)
        own = self.unused(batch[0][:, :2]).sum()
        return loss + float("nan") * own if torch.equal(batch[0], data(TASKS)[2][0]) else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.5)


def test_a_dropped_task_leaves_no_trace() -> None:
    found = fit(WithOwnPart(), ga.GradientAgreement(nonfinite="drop"), tasks=TASKS)
    expected = fit(WithOwnPart(skipped=(2,)), ga.GradientAgreement(), tasks=TASKS)
    assert_same(found, expected)
    assert found.stepped[0].keys() == expected.stepped[0].keys()
    assert "unused.weight" not in found.stepped[0]
