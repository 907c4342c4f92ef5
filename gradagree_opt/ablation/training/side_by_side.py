"""Groups of runs on one GPU, each a stream of work of its own, as many as its memory holds."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.captured import peak_bytes
from gradagree_opt.ablation.training.checkpoint import States
from gradagree_opt.ablation.training.networks import initial_params
from gradagree_opt.ablation.training.problem import Problem
from gradagree_opt.ablation.training.program import Program, Tell
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.training import (
    Report,
    Steps,
    Trained,
    run_settings,
    training,
)

SHARE_OF_MEMORY = 0.6
"""Of the free memory: what a step takes is known, a test may take more."""


def train_side_by_side(
    study: Study,
    problem: Problem,
    groups: Sequence[list[Run]],
    at_once: int | None,
    report: Report,
    tell: Tell,
    checkpoint_of: Callable[[list[Run]], States | None] = lambda _: None,
) -> Iterator[Trained]:
    """Trains groups of runs and yields what each finds, as they end.

    They take turns on the host, which stays ahead of the device. TorchJD's aggregators draw from
    the generator of the process: each of their groups is trained by itself.

    Args:
        at_once: The most runs at a time, None for all; a larger group is trained by itself.
        report: As for :func:`gradagree_opt.ablation.training.training.train_runs`.
        tell: Called with one sentence for a method whose steps cannot be captured.
        checkpoint_of: Where a group is resumed from and writes its states; None for nowhere.
    """
    alone = [group for group in groups if group[0].method.of_torchjd]
    others = [group for group in groups if not group[0].method.of_torchjd]
    for together in [others, *([group] for group in alone)]:
        if together:
            with run_settings(study, together[0][0].seed, problem.device):
                yield from take_turns(
                    study, problem, together, at_once, report, tell, checkpoint_of
                )


@dataclass
class Turn:
    """A group that is being trained, and the seconds that it has had."""

    runs: list[Run]
    stream: AbstractContextManager[object]
    seconds: float = 0.0
    steps: Steps | None = None


def take_turns(
    study: Study,
    problem: Problem,
    groups: Sequence[list[Run]],
    at_once: int | None,
    report: Report,
    tell: Tell,
    checkpoint_of: Callable[[list[Run]], States | None],
) -> Iterator[Trained]:
    """Advances each group by one block in turn; a group waits until there is room for it."""
    waiting, active = list(groups), list[Turn]()
    before = time.perf_counter()
    while waiting or active:
        running = sum(len(turn.runs) for turn in active)
        while waiting and (not active or at_once is None or running + len(waiting[0]) <= at_once):
            turn = Turn(waiting.pop(0), own_stream(problem.device))
            turn.steps = training(
                study,
                problem,
                turn.runs,
                report,
                checkpoint_of(turn.runs),
                tell=tell,
                clock=clock_of(turn),
            )
            running += len(turn.runs)
            active.append(turn)
        ended: list[Trained] = []
        for turn in list(active):
            assert turn.steps is not None
            with turn.stream:
                try:
                    next(turn.steps)
                except StopIteration as end:
                    active.remove(turn)
                    ended.append(end.value)
        now = time.perf_counter()
        for turn in active:
            turn.seconds += (now - before) * len(turn.runs) / running
        before = now
        yield from ended


def clock_of(turn: Turn) -> Callable[[], float]:
    return lambda: turn.seconds


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU, what makes a stream of its own the current one."""
    if device.type == "cpu":
        return nullcontext()
    stream: Any = torch.cuda.Stream
    current: AbstractContextManager[object] = torch.cuda.stream(stream(device))
    return current


def runs_at_once(study: Study, problem: Problem, run: Run) -> int | None:
    """How many runs a GPU's memory holds at once, by what the first steps of one of them take."""
    device = problem.device
    if device.type == "cpu":
        return None

    def first_steps() -> None:
        with run_settings(study, run.seed, device), own_stream(device):
            program = Program(study, problem, [run], [initial_params(study, run.seed)], ignore)
            program.advance(1)

    each = max(1, peak_bytes(first_steps, device))
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(SHARE_OF_MEMORY * free / each))


def ignore(_: str) -> None:
    """Says nothing: the training itself will."""
