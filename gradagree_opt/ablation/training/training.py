"""A group of runs: train a method from its seeds at its outer rates, validate, test at the end."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeAlias

import torch
from torch.utils._pytree import tree_map

from gradagree_opt.ablation.study.methods import without_advice
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.checkpoint import State, States
from gradagree_opt.ablation.training.devices import CPU, arithmetic, describe
from gradagree_opt.ablation.training.grouping import is_compiled, select
from gradagree_opt.ablation.training.networks import Params, derived_seed, initial_params
from gradagree_opt.ablation.training.problem import (
    Problem,
    Tasks,
    TrainingBatch,
    TrainingTasks,
    evaluation_tasks,
)
from gradagree_opt.ablation.training.program import Program, Tell
from gradagree_opt.ablation.training.run import CurvePoint, Run, RunRecord
from gradagree_opt.ablation.training.scoring import (
    check_untrained,
    matrices_of_runs,
    scores_of_runs,
)
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.engines.compilation import PROGRAMS

CURVE_POINTS = 20

Report: TypeAlias = Callable[[int], None]
Trained: TypeAlias = list[tuple[RunRecord, Params]]
"""The records of a group of runs, and their parameters on the CPU."""
Steps: TypeAlias = Generator[None, None, Trained]
"""A training that stops where another one may go on, at the end of a block or before it waits."""


def train_runs(
    study: Study,
    problem: Problem,
    runs: list[Run],
    report: Report,
    checkpoint: States | None = None,
) -> Trained:
    """Trains runs of one method together; what each finds is what it finds alone, up to rounding.

    Everything is drawn from generators seeded by the run's seed and the purpose alone, so all
    methods and rates of a seed start from the same parameters and see the same tasks in the same
    order.

    Args:
        report: Called now and then with the number of outer steps since its last call, those of
            all runs together.
        checkpoint: What to go on from, and to write now and then.

    Returns:
        The record of each run, with its share of the seconds, and the trained parameters.
    """
    with run_settings(study, runs[0].seed):
        steps = training(study, problem, runs, report, checkpoint)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                trained: Trained = end.value
                return trained


def training(
    study: Study,
    problem: Problem,
    runs: list[Run],
    report: Report,
    checkpoint: States | None = None,
    *,
    tell: Tell = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Steps:
    """:func:`train_runs`, step by step, by the settings of the process as they are.

    Args:
        tell: Called with one sentence where a step on a GPU cannot be captured.
        clock: The seconds that the group has had, of which each run's share is recorded.
    """
    start = clock()
    group = Group(study, problem, runs, tell)
    if runs[0].method.of_torchjd:  # whose aggregators may remember more than can be read
        checkpoint = None
    if checkpoint is not None and (state := checkpoint.read()):
        group.restore(state)
        start -= state["seconds"]
    for steps in group.fit():
        if steps:
            report(steps)
        at_rest = steps is not None and group.program.at_end_of_block
        if checkpoint is not None and at_rest and checkpoint.due:
            checkpoint.write(group.saved() | {"seconds": clock() - start})
        yield
    group.program.release()
    tested = yield from group.test()
    seconds = (clock() - start) / len(runs)
    hardware = describe(problem.device, study.tf32)
    return [
        (row.record(*measured, seconds).model_copy(update={"hardware": hardware}), row.params)
        for row, measured in zip(group.rows, tested, strict=True)
    ]


class Training:
    """One run on its way: its learning curve up to where it overflows, and its parameters there."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.curve: list[CurvePoint] = []
        self.params: Params = {}

    @property
    def diverged(self) -> bool:
        return bool(self.curve) and not math.isfinite(self.curve[-1].loss)

    def record(
        self, tested: dict[int, float], agreement: list[list[float]] | None, seconds: float
    ) -> RunRecord:
        return RunRecord(
            run=self.run,
            validation=math.inf if self.diverged else self.curve[-1].loss,
            test=tested,
            curve=self.curve,
            agreement=agreement,
            seconds=seconds,
        )


class Group:
    """Runs that are trained and tested together; those that diverge are no longer looked at.

    The row of a diverged run is computed on, since a smaller group would be another program.
    """

    def __init__(self, study: Study, problem: Problem, runs: list[Run], tell: Tell) -> None:
        self.study, self.problem = study, problem
        self.rows = [Training(run) for run in runs]
        initial = [initial_params(study, run.seed) for run in runs]
        self.program = Program(study, problem, runs, initial, tell)
        self.validation = self.tasks_of_runs(
            lambda seed: evaluation_tasks(problem, study.tuning.tasks, "validation", seed)
        )
        self.alive = list(range(len(runs)))

    def tasks_of_runs(self, tasks_of: Callable[[int], PyTree]) -> list[PyTree]:
        """The tasks of each run, drawn once for each seed."""
        seeds = {row.run.seed for row in self.rows}
        by_seed = {seed: tasks_of(seed) for seed in sorted(seeds)}
        return [by_seed[row.run.seed] for row in self.rows]

    def params(self) -> Params:
        """Of the runs that have not diverged: a copy, leaves ``[runs, *shape]``."""
        alive = torch.tensor(self.alive, device=self.problem.device)
        params: Params = tree_map(lambda leaf: leaf.index_select(0, alive), self.program.params)
        return params

    def fit(self) -> Iterator[int | None]:
        """Trains until every run has done its outer steps or has diverged.

        Yields:
            The outer steps that are to be reported, those of all runs together: a run that has
            diverged counts with all of its steps, another with those up to its last look. None in
            the midst of a look.
        """
        study, program = self.study, self.program
        every = max(1, study.iterations // CURVE_POINTS)
        reported = 0
        if not self.rows[0].curve:  # which a state that was saved before the first step has
            yield from self.look()
        while True:
            steps = self.counted() - reported
            reported += steps
            yield steps
            if not self.alive or program.done == study.iterations:
                return
            look = min((program.done // every + 1) * every, study.iterations)
            program.advance(min(look, program.block_end))
            if program.done == look:
                yield from self.look()

    def counted(self) -> int:
        """The outer steps of all runs, up to their last looks."""
        of_runs = [
            self.study.iterations if row.diverged else row.curve[-1].iteration for row in self.rows
        ]
        return sum(of_runs)

    def saved(self) -> State:
        """What :meth:`restore` goes on from."""
        rows = [
            {"curve": [point.model_dump() for point in row.curve], "params": row.params}
            for row in self.rows
        ]
        return {"program": self.program.saved(), "rows": rows}

    def restore(self, state: State) -> None:
        """Becomes the group that was saved, to the bit."""
        self.program.restore(state["program"])
        for row, saved in zip(self.rows, state["rows"], strict=True):
            row.curve = [CurvePoint(**point) for point in saved["curve"]]
            row.params = saved["params"]
        self.alive = [index for index, row in enumerate(self.rows) if not row.diverged]

    def look(self) -> Iterator[None]:
        """Adds a point to the curve of every run that has not diverged."""
        params, steps, done = self.params(), self.study.tuning.steps, self.program.done
        tasks = [self.validation[row] for row in self.alive]
        scores = scores_of_runs(self.problem, self.problem.loss, params, tasks, [steps])
        yield
        diagnostics = tree_map(lambda leaf: leaf.cpu(), self.program.diagnostics) if done else None
        for index, (row, loss) in enumerate(zip(self.alive, scores[steps].tolist(), strict=True)):
            if diagnostics is None:
                check_untrained(loss, steps, self.rows[row].run.seed)
            logged = {} if diagnostics is None else select(diagnostics, row).log()
            point = CurvePoint(iteration=done, loss=loss, diagnostics=logged)
            self.rows[row].curve.append(point)
            self.rows[row].params = tree_map(lambda leaf: leaf.cpu(), select(params, index))
        self.alive = [row for row in self.alive if not self.rows[row].diverged]

    def test(
        self,
    ) -> Generator[None, None, list[tuple[dict[int, float], list[list[float]] | None]]]:
        """For each run the mean score after each number of gradient steps, and the agreement.

        The score is over unseen tasks. The agreement matrix is that of the seed's first training
        batch, the same for every method.
        """
        study, problem = self.study, self.problem
        steps = study.test.steps
        found: list[tuple[dict[int, float], list[list[float]] | None]] = [
            (dict.fromkeys(steps, math.inf), None) for _ in self.rows
        ]
        if not self.alive:
            return found
        params = self.params()
        tests, batches = (
            [tasks[row] for row in self.alive]
            for tasks in (self.tasks_of_runs(self.test_tasks), self.tasks_of_runs(self.first_batch))
        )
        scores = scores_of_runs(problem, problem.score, params, tests, steps)
        matrices = matrices_of_runs(problem, params, batches)
        yield
        means = {step: values.tolist() for step, values in scores.items()}
        for index, (row, matrix) in enumerate(zip(self.alive, matrices.tolist(), strict=True)):
            own = {step: means[step][index] for step in steps}
            finite = {step: mean if math.isfinite(mean) else math.inf for step, mean in own.items()}
            found[row] = finite, matrix
        return found

    def test_tasks(self, seed: int) -> Tasks:
        return evaluation_tasks(self.problem, self.study.test.tasks, "test", seed)

    def first_batch(self, seed: int) -> TrainingBatch:
        batch = TrainingTasks(self.study, self.problem, seed)(0)
        placed: TrainingBatch = tree_map(lambda leaf: leaf.to(self.problem.device), batch)
        return placed


@contextmanager
def run_settings(study: Study, seed: int, device: torch.device = CPU) -> Iterator[None]:
    """One thread for each run: the runs share the cores, and sums are taken in one order.

    The global generator, which TorchJD's aggregators draw from, is that of the run for a while.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            many_programs() if is_compiled(study) else nullcontext(),
            torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
            arithmetic(device, study.tf32),
            without_advice(),
        ):
            torch.manual_seed(derived_seed(seed, "weights"))
            yield
    finally:
        torch.set_num_threads(threads)


def many_programs() -> AbstractContextManager[None]:
    """Compiled code is kept for every method that a process comes across.

    Here torch first imports its compiler, which takes as long as all the rest of torch.
    """
    kept: AbstractContextManager[None] = torch._dynamo.config.patch(
        cache_size_limit=PROGRAMS, accumulated_cache_size_limit=PROGRAMS
    )
    return kept
