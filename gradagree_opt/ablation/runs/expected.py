"""How many runs a study has, and how long those that are missing take."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean

from gradagree_opt.ablation.runs.store import recorded
from gradagree_opt.ablation.runs.sweep import Records, Sweep, candidates, count_runs, tuning_runs
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.grouping import groups
from gradagree_opt.ablation.training.problem import build_problem
from gradagree_opt.ablation.training.run import Run, RunRecord
from gradagree_opt.ablation.training.training import CURVE_POINTS, train_runs

TIMED_STEPS = 3


@dataclass(frozen=True)
class Expected:
    """The work of a study.

    Attributes:
        runs: Of all parts, tuning and final; a method whose best rate is at an edge adds to them.
        finished: Those of them that have a record.
        most_added: The most runs that rates beyond an edge can add.
        seconds: Of the missing runs, one after the other.
        timed: The methods whose steps were timed, since no run of theirs has a record.
    """

    runs: int
    finished: int
    most_added: int
    seconds: float
    timed: list[str]


def expect(sweeps: Sequence[Sweep]) -> Expected:
    """What the parts of a study still take; nothing is written.

    A method's run takes as long as those of it that are finished did in the mean. Where none is,
    a few of its steps are timed, without compilation, and the test protocol.
    """
    runs = finished = added = 0
    seconds, timed = 0.0, []
    for sweep in sweeps:
        study = sweep.study
        records = recorded(sweep.store, study, sweep.digest).records
        of_method: dict[str, list[RunRecord]] = {method.name: [] for method in study.methods}
        for record in records.values():
            of_method[record.run.method.name].append(record)
        unknown = [name for name, found in of_method.items() if not found]
        timed += [name for name in unknown if name not in timed]
        costs = time_runs(sweep, unknown)
        for method in study.methods:
            found = of_method[method.name]
            count = count_runs(study, method, records)
            cost = mean(each.seconds for each in found) if found else costs[method.name]
            runs, finished = runs + count, finished + len(found)
            seconds += (count - len(found)) * cost
            added += rates_left(study, method, records) * len(study.tuning_seeds)
    return Expected(runs, finished, added, seconds, timed)


def rates_left(study: Study, method: Method, records: Records) -> int:
    """The most rates that may yet be tried beyond those that the records lead to."""
    rates = candidates(study, method, records)
    left = study.outer.extend - (len(rates) - len(study.rates(method)))
    labels = product([method.name], rates, study.tuning_seeds)
    if left and all(label in records for label in labels):
        return 0  # the best is between others
    return left


def time_runs(sweep: Sweep, methods: Sequence[str]) -> dict[str, float]:
    """The seconds of one run of each method, in a group that is trained together.

    Of each method a few outer steps are timed; what the test protocol takes, on the first alone.
    """
    if not methods:
        return {}
    whole = sweep.study.model_copy(update={"compile": False})
    problem = build_problem(whole, sweep.data)
    bare = whole
    if whole.adapts:  # in multi-task learning the number of tasks is given
        tuning = whole.tuning.model_copy(update={"tasks": 1})
        test = whole.test.model_copy(update={"tasks": 1})
        bare = whole.model_copy(update={"tuning": tuning, "test": test})

    fewer = whole.tuning.model_copy(update={"seeds": whole.tuning_seeds[: sweep.group_size]})
    first: dict[str, list[Run]] = {}  # no group has more seeds than that
    for group in groups(tuning_runs(whole.model_copy(update={"tuning": fewer})), sweep.group_size):
        first.setdefault(group[0].method.name, group)

    def time_run(study: Study, name: str, steps: int) -> float:
        shortened = study.model_copy(update={"iterations": steps})
        [(record, _), *_] = train_runs(shortened, problem, first[name], lambda _: None)
        return record.seconds

    time_run(bare, methods[0], 1)  # what is done once
    one, two = (time_run(whole, methods[0], steps) for steps in (1, 2))
    look = max(0.0, two - one)  # a point of the curve after each step; a step beside it is little
    protocol = one + (CURVE_POINTS - 1) * look
    found = {}
    for name in methods:
        few, more = (time_run(bare, name, steps) for steps in (1, 1 + TIMED_STEPS))
        found[name] = protocol + sweep.study.iterations * max(0.0, more - few) / TIMED_STEPS
    return found


def duration(seconds: float) -> str:
    """A time in the largest unit that it has two of.

    >>> duration(0.2), duration(90.0), duration(7100.0), duration(4e5)
    ('1 s', '90 s', '118 min', '111 h')
    """
    for unit, length, most in (("s", 1, 120), ("min", 60, 120)):
        if seconds < most * length:
            return f"{max(1, round(seconds / length))} {unit}"
    return f"{round(seconds / 3600)} h"
