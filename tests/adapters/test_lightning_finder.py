"""The learning-rate finder, with the hook of docs/adapters/lightning.md that adds the callback."""

from typing import Any

import pytest
import torch

import gradagree_opt as ga

pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from gradagree_opt.adapters.lightning import AgreementCallback
from lightning.pytorch.tuner import Tuner

from .lightning_cases import (
    FILTERS,
    TASKS,
    Automatic,
    data,
    one_task_a_batch,
    stacked,
    trainer,
    windows_of,
)

pytestmark = FILTERS


class Found(Automatic):
    """Adds the callback whenever a run starts without it."""

    def __init__(self, callback: Any) -> None:
        super().__init__()
        self.callback, self.lr = callback, 0.01

    def on_train_start(self) -> None:
        if self.callback is not None and self.callback not in self.trainer.callbacks:
            self.trainer.callbacks.append(self.callback)


def found(tmp_path: Any, aggregator: ga.Aggregator | None) -> tuple[Found, Any]:
    """The module after a search, and the trainer that it was searched with."""
    callback = None if aggregator is None else AgreementCallback(aggregator)
    module = Found(callback)
    callbacks = [] if callback is None else [callback]
    run = trainer(
        callbacks=callbacks, accumulate_grad_batches=TASKS, max_epochs=2, default_root_dir=tmp_path
    )
    options = {"num_training": 3, "min_lr": 1e-3, "max_lr": 1e-2, "early_stop_threshold": None}
    Tuner(run).lr_find(module, one_task_a_batch(data(8)), **options, update_attr=False)
    return module, run


@pytest.mark.parametrize("aggregator", [ga.GradientAgreement(), ga.EqualAgreement(), ga.Sum()])
def test_the_finder_steps_on_the_aggregation(tmp_path: Any, aggregator: ga.Aggregator) -> None:
    module, run = found(tmp_path, aggregator)
    first = stacked(Automatic(), windows_of(data(8), TASKS)[0])
    torch.testing.assert_close(module.stepped[0], aggregator(first), rtol=1e-5, atol=1e-6)
    assert run.callbacks == [module.callback]


def test_with_the_mean_the_finder_does_what_it_does_without_us(tmp_path: Any) -> None:
    ours, own = found(tmp_path, ga.Mean())[0], found(tmp_path, None)[0]
    assert len(own.stepped) == 3
    torch.testing.assert_close(ours.stepped, own.stepped, rtol=1e-5, atol=1e-6)
