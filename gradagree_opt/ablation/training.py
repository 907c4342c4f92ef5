"""One run: train a method at one outer rate from one seed, validate on the way, test at the end."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch._dynamo

from gradagree_opt.ablation.models import Params, generator, initial_params
from gradagree_opt.ablation.problem import Problem, TrainingTasks, evaluation_tasks, scores_after
from gradagree_opt.ablation.records import CurvePoint, Run, RunRecord
from gradagree_opt.ablation.study import Study
from gradagree_opt.adapters.plain import train
from gradagree_opt.meta import MetaStep

CURVE_POINTS = 20
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def train_run(
    study: Study, problem: Problem, run: Run, report: Callable[[int], None]
) -> tuple[RunRecord, Params]:
    """Trains one run.

    Everything is drawn from generators seeded by the run's seed and the purpose alone, so all
    methods and rates of a seed start from the same parameters and see the same tasks in the same
    order.

    Args:
        report: Called now and then with the number of outer steps since its last call.

    Returns:
        The record, and the trained parameters.
    """
    start = time.perf_counter()
    with run_settings():
        params = {
            name: leaf.requires_grad_() for name, leaf in initial_params(study, run.seed).items()
        }
        curve = fit(study, problem, run, params, report)
        report(study.iterations - curve[-1].iteration)
        finite = math.isfinite(curve[-1].loss)
        scores = test(study, problem, params, run.seed) if finite else {}
    record = RunRecord(
        run=run,
        validation=curve[-1].loss if finite else math.inf,
        test={step: scores.get(step, math.inf) for step in study.test.steps},
        curve=curve,
        seconds=time.perf_counter() - start,
    )
    return record, params


def fit(
    study: Study, problem: Problem, run: Run, params: Params, report: Callable[[int], None]
) -> list[CurvePoint]:
    """Trains the parameters in place and returns the learning curve, up to where it overflows."""
    optimizer = OPTIMIZERS[study.outer.optimizer](list(params.values()), lr=run.rate)
    validation = evaluation_tasks(problem, study.tuning.tasks, "validation", run.seed)
    every = max(1, study.iterations // CURVE_POINTS)

    def validation_loss() -> float:
        steps = study.tuning.steps
        scores = scores_after(problem, problem.loss, params, validation, [steps])
        return scores[steps].mean().item()

    curve = [CurvePoint(iteration=0, loss=validation_loss(), diagnostics={})]

    def after_step(iteration: int, step: MetaStep) -> bool:
        done = iteration + 1
        if study.outer.schedule == "linear":
            optimizer.param_groups[0]["lr"] = run.rate * (1 - done / study.iterations)
        if done % every and done != study.iterations:
            return False
        report(done - curve[-1].iteration)
        loss = validation_loss()
        curve.append(CurvePoint(iteration=done, loss=loss, diagnostics=step.diagnostics.log()))
        return not math.isfinite(loss)

    train(
        problem.learner,
        params,
        TrainingTasks(study, problem, run.seed),
        optimizer,
        run.method.build(generator(run.seed, "weights")),
        iterations=study.iterations,
        callback=after_step,
    )
    return curve


def test(study: Study, problem: Problem, params: Params, seed: int) -> dict[int, float]:
    """The mean score over unseen tasks after each number of gradient steps."""
    tasks = evaluation_tasks(problem, study.test.tasks, "test", seed)
    scores = scores_after(problem, problem.score, params, tasks, study.test.steps)
    return {step: values.mean().item() for step, values in scores.items()}


@contextmanager
def run_settings() -> Iterator[None]:
    """One thread for each run: the runs share the cores, and sums are taken in one order.

    Compiled code is kept for every method that a process comes across; the default limit is 8.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch._dynamo.config.patch(cache_size_limit=64):
            yield
    finally:
        torch.set_num_threads(threads)
