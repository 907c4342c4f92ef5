"""The devices that tests run on, and one group of runs trained there."""

from collections.abc import Callable

import pytest
import torch

from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.checkpoint import Checkpoint
from gradagree_opt.ablation.training.problem import Problem
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.side_by_side import own_stream
from gradagree_opt.ablation.training.training import Trained, run_settings, training

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def refuse(sentence: str) -> None:
    """Fails the test of a group whose steps were to be captured."""
    pytest.fail(sentence)


def train_group(
    study: Study,
    problem: Problem,
    runs: list[Run],
    checkpoint: Checkpoint | None = None,
    turns: int | None = None,
    tell: Callable[[str], None] = refuse,
) -> Trained:
    """What the runs find on the device of the problem; nothing where they stop after some turns."""
    with (
        run_settings(study, runs[0].seed, problem.device),
        own_stream(problem.device),
    ):
        steps = training(study, problem, runs, lambda _: None, checkpoint, tell=tell)
        while turns is None or turns > 0:
            try:
                next(steps)
            except StopIteration as end:
                trained: Trained = end.value
                return trained
            turns = None if turns is None else turns - 1
        steps.close()
        return []
