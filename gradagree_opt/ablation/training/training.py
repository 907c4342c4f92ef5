"""A group of runs: train a method from its seeds at its outer rates, validate, test at the end."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch._dynamo

from gradagree_opt.ablation.study.methods import without_advice
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.grouping import StepInputs, select, stack
from gradagree_opt.ablation.training.networks import Params, derived_seed, generator, initial_params
from gradagree_opt.ablation.training.problem import (
    Problem,
    TrainingTasks,
    agreement_matrix,
    evaluation_tasks,
    scores_after,
)
from gradagree_opt.ablation.training.run import CurvePoint, Run, RunRecord
from gradagree_opt.core.diagnostics import Diagnostics
from gradagree_opt.engines.compilation import PROGRAMS

CURVE_POINTS = 20


def train_runs(
    study: Study, problem: Problem, runs: list[Run], report: Callable[[int], None]
) -> list[tuple[RunRecord, Params]]:
    """Trains runs of one method together; what each finds is what it finds alone, up to rounding.

    Everything is drawn from generators seeded by the run's seed and the purpose alone, so all
    methods and rates of a seed start from the same parameters and see the same tasks in the same
    order.

    Args:
        report: Called now and then with the number of outer steps since its last call, those of
            all runs together.

    Returns:
        The record of each run, with its share of the seconds, and the trained parameters.
    """
    start = time.perf_counter()
    with run_settings(runs[0].seed):
        trainings = fit(study, problem, runs, report)
        found = [(training.test(), training.agreement()) for training in trainings]
    seconds = (time.perf_counter() - start) / len(runs)
    return [
        (training.record(*measured, seconds), training.params)
        for training, measured in zip(trainings, found, strict=True)
    ]


class Training:
    """One run on its way: its learning curve up to where it overflows, and its parameters there."""

    def __init__(self, study: Study, problem: Problem, run: Run, params: Params) -> None:
        self.study, self.problem, self.run = study, problem, run
        self.validation = evaluation_tasks(problem, study.tuning.tasks, "validation", run.seed)
        self.curve: list[CurvePoint] = []
        self.look(0, params, {})

    def look(self, done: int, params: Params, diagnostics: dict[str, float]) -> None:
        """Adds the point of the curve after the outer steps that are done."""
        steps = self.study.tuning.steps
        scores = scores_after(self.problem, self.problem.loss, params, self.validation, [steps])
        loss = scores[steps].mean().item()
        self.curve.append(CurvePoint(iteration=done, loss=loss, diagnostics=diagnostics))
        self.params = params

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.curve[-1].loss)

    def test(self) -> dict[int, float]:
        """The mean score over unseen tasks after each number of gradient steps."""
        steps = self.study.test.steps
        if self.diverged:
            return dict.fromkeys(steps, math.inf)
        tasks = evaluation_tasks(self.problem, self.study.test.tasks, "test", self.run.seed)
        scores = scores_after(self.problem, self.problem.score, self.params, tasks, steps)
        means = {step: values.mean().item() for step, values in scores.items()}
        return {step: mean if math.isfinite(mean) else math.inf for step, mean in means.items()}

    def agreement(self) -> list[list[float]] | None:
        """The agreement matrix of the seed's first training batch, the same for every method."""
        if self.diverged:
            return None
        support = TrainingTasks(self.study, self.problem, self.run.seed)(0)["support"]
        matrix: list[list[float]] = agreement_matrix(self.problem, self.params, support).tolist()
        return matrix

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


def fit(
    study: Study, problem: Problem, runs: list[Run], report: Callable[[int], None]
) -> list[Training]:
    """Trains until every run has done its outer steps or has diverged.

    The row of a diverged run is computed on, since a smaller group would be another program, but
    no longer looked at.
    """
    initial = [initial_params(study, run.seed) for run in runs]
    trainings = [
        Training(study, problem, run, params) for run, params in zip(runs, initial, strict=True)
    ]
    every = max(1, study.iterations // CURVE_POINTS)
    reported = 0
    for done, (params, diagnostics) in enumerate(outer_steps(study, problem, runs, initial), 1):
        if done % every and done != study.iterations:
            continue
        for row, training in enumerate(trainings):
            if training.diverged:
                continue
            training.look(done, select(params, row), select(diagnostics, row).log())
            report((study.iterations if training.diverged else done) - reported)
        reported = done
        if all(training.diverged for training in trainings):
            break
    return trainings


def outer_steps(
    study: Study, problem: Problem, runs: list[Run], initial: list[Params]
) -> Iterator[tuple[Params, Diagnostics]]:
    """The parameters and the diagnostics after each outer step, their leaves ``[runs, *shape]``."""
    sources = {run.seed: TrainingTasks(study, problem, run.seed) for run in runs}
    aggregators = [run.method.build(generator(run.seed, "weights")) for run in runs]
    rates = torch.tensor([run.rate for run in runs])
    params = stack(initial)
    outer_step = problem.outer_steps[study.optimizer(runs[0].method)]
    state = outer_step.initial(initial)
    step = outer_step.alone if runs[0].method.of_torchjd else outer_step
    for iteration in range(study.iterations):
        tasks = {seed: source(iteration) for seed, source in sources.items()}
        draws = [aggregator.draw(study.meta_batch) for aggregator in aggregators]
        left = 1 - iteration / study.iterations if study.outer.schedule == "linear" else 1.0
        rows = StepInputs(
            params,
            state,
            rates * left,
            stack([tasks[run.seed] for run in runs]),
            None if draws[0] is None else stack(draws),
        )
        params, state, aggregation = step(aggregators[0], rows)
        yield params, aggregation.diagnostics


@contextmanager
def run_settings(seed: int) -> Iterator[None]:
    """One thread for each run: the runs share the cores, and sums are taken in one order.

    Compiled code is kept for every method that a process comes across.
    The global generator, which TorchJD's aggregators draw from, is that of the run for a while.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            torch._dynamo.config.patch(
                cache_size_limit=PROGRAMS, accumulated_cache_size_limit=PROGRAMS
            ),
            torch.random.fork_rng(devices=[]),
            without_advice(),
        ):
            torch.manual_seed(derived_seed(seed, "weights"))
            yield
    finally:
        torch.set_num_threads(threads)
