"""The runs of a study: every method tuned on as many outer rates, then run on every seed."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import product, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Generator

from gradagree_opt.ablation.runs.job import Job
from gradagree_opt.ablation.runs.processes import Report, execute
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.checkpoint import Checkpoints
from gradagree_opt.ablation.training.devices import CPU, describe
from gradagree_opt.ablation.training.grouping import (
    compiler_failure,
    group_size,
    groups,
    is_compiled,
)
from gradagree_opt.ablation.training.problem import build_problem, data_digest
from gradagree_opt.ablation.training.run import FORMAT, DamagedRecordError, Run, RunRecord, Store

CHECKPOINT_SECONDS = 300.0

Label: TypeAlias = tuple[str, float, int]
Records: TypeAlias = Mapping[Label, RunRecord]
Ended: TypeAlias = Callable[[Study, RunRecord, bool], None]
"""``ended(study, record, found)``: the record of a run, and whether it was found finished."""


@dataclass(frozen=True)
class Part:
    """A finished study at one fraction of corrupted tasks.

    Attributes:
        records: Every run, tuning and final, by its label.
        rates: The outer rate chosen for each method, by the method's name.
    """

    study: Study
    records: dict[Label, RunRecord]
    rates: dict[str, float]

    def final(self, name: str) -> list[RunRecord]:
        """The runs of a method at its chosen rate, in the order of the study's seeds."""
        return [self.records[name, self.rates[name], seed] for seed in self.study.seeds]

    def candidates(self, name: str) -> list[float]:
        """The rates that a method was tuned on, in rising order."""
        [method] = (method for method in self.study.methods if method.name == name)
        return sorted(candidates(self.study, method, self.records))

    def at_edge(self, name: str) -> bool:
        """Whether a better rate may lie beyond the smallest or largest of the candidates."""
        rates = self.candidates(name)
        return len(rates) > 1 and self.rates[name] in (rates[0], rates[-1])


def candidates(study: Study, method: Method, records: Records) -> list[float]:
    """The rates to tune a method on: those given, then those beyond an edge that the best was at.

    Of the latter, as many as the records lead to: the last one may have none yet.
    """
    rates = [*study.rates(method)]
    for _ in range(study.outer.extend):
        labels = product([method.name], rates, study.tuning_seeds)
        if any(label not in records for label in labels):
            break
        rising, best = sorted(rates), best_rate(study, method, rates, records)
        if best not in (rising[0], rising[-1]):
            break
        neighbour = rising[1] if best == rising[0] else rising[-2]
        rates.append(float(f"{best * best / neighbour:.4g}"))  # 0.3333 is easily typed again
    return rates


def best_rate(study: Study, method: Method, rates: list[float], records: Records) -> float:
    """The one with the lowest validation loss over the tuning seeds; of equal ones, the smallest.

    The test scores are not looked at.
    """

    def loss(rate: float) -> float:
        return sum(records[method.name, rate, seed].validation for seed in study.tuning_seeds)

    return min(sorted(rates), key=loss)


def choose_rates(study: Study, records: Records) -> dict[str, float]:
    """For each method the best of its candidate rates."""
    return {
        method.name: best_rate(study, method, candidates(study, method, records), records)
        for method in study.methods
    }


def tuning_runs(study: Study, records: Records = MappingProxyType({})) -> list[Run]:
    """Every method at each of its candidate rates, from the seeds that rates are chosen on."""
    rates = [candidates(study, method, records) for method in study.methods]
    return [
        Run(method=method, rate=rate, seed=seed)
        for seed in study.tuning_seeds
        for turn in zip_longest(*rates)
        for method, rate in zip(study.methods, turn, strict=True)
        if rate is not None
    ]


def final_runs(study: Study, rates: dict[str, float]) -> list[Run]:
    """Every method at its chosen rate, from every seed of the study."""
    return [
        Run(method=method, rate=rates[method.name], seed=seed)
        for method in study.methods
        for seed in study.seeds
    ]


def count_runs(study: Study, method: Method, records: Records) -> int:
    """Of a method, tuning and final ones together, as far as the records lead."""
    tuned = len(candidates(study, method, records)) * len(study.tuning_seeds)
    return tuned + len(set(study.seeds).difference(study.tuning_seeds))


def number_of_runs(study: Study, records: Records) -> int:
    """Of all methods; it grows with each rate that is tried beyond an edge."""
    return sum(count_runs(study, method, records) for method in study.methods)


def check_methods(study: Study) -> None:
    """Raises a StudyError where a package is missing, or a method of the user's own does not do."""
    for method in study.methods:
        try:
            if method.references:
                method.try_own(study.meta_batch)
            method.build(Generator())
        except (ImportError, ValueError) as error:
            raise StudyError(f"the method {method.name!r}: {error}") from None


def compiles(study: Study, warn: Callable[[str], None], device: torch.device = CPU) -> bool:
    """Whether the study is compiled; where it would be, the compiler is tried, in some seconds.

    On a GPU it is not: there its steps are captured, which takes no time and saves more.

    Args:
        warn: Called with one sentence where it goes on without a compiler.

    Raises:
        StudyError: It cannot be compiled and says ``compile: true``.
    """
    if device.type != "cpu" or not is_compiled(study):
        return False
    failure = compiler_failure()
    if failure is None:
        return True
    mend = "install one, as g++, with Python's headers"
    if study.compile is True:
        raise StudyError(
            f"compile: true needs a C++ compiler, found {failure}; {mend}, or give the study "
            "compile: false, which takes several times as long"
        )
    warn(
        f"compile: auto needs a C++ compiler, found {failure}; the study goes on without, which "
        f"takes several times as long, or {mend}"
    )
    return False


class Sweep:
    """The runs of a study in its output folder, those that are finished left as they are.

    Args:
        warn: Called with one sentence for each record that is damaged, and for each method whose
            steps on a GPU take longer than they could.
        device: What its runs are trained on.
        checkpoint_seconds: After so many a group of runs writes what it goes on from when its
            process has been killed.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        data: Path | None,
        warn: Callable[[str], None],
        device: torch.device = CPU,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.study, self.data, self.warn, self.device = study, data, warn, device
        self.checkpoint_seconds = checkpoint_seconds
        self.store = Store(folder)
        check_methods(study)
        problem = build_problem(study, data)
        self.digest = data_digest(problem)
        self.group_size = group_size(study, problem.module)
        self.records: dict[Label, RunRecord] = {}

    @cached_property
    def compiled(self) -> bool:
        """As :func:`compiles` says, which is asked once: the parts of a study share its answer."""
        return compiles(self.study, self.warn, self.device)

    @property
    def iterations(self) -> int:
        """The outer steps of the whole study, finished runs included, as far as is known."""
        return self.study.iterations * number_of_runs(self.study, self.records)

    def run(self, jobs: int, report: Report, ended: Ended = lambda *_: None) -> Part:
        """Does what is missing, with that many processes; on a GPU with one.

        Args:
            report: Called with numbers of outer steps, as they are done.
            ended: Called for each run, as it ends or is found finished.
        """
        for _ in range(1 + self.study.outer.extend):
            self.complete(tuning_runs(self.study, self.records), jobs, report, ended)
        rates = choose_rates(self.study, self.records)
        self.complete(final_runs(self.study, rates), jobs, report, ended)
        return Part(self.study, self.records, rates)

    def complete(
        self, runs: list[Run], jobs: int, report: Report, ended: Ended = lambda *_: None
    ) -> None:
        missing = []
        for run in runs:
            if run.label in self.records:
                continue
            record = self.finished(run)
            if record is None:
                missing.append(run)
            else:
                self.records[run.label] = record
                ended(self.study, record, True)
        checkpoints = self.checkpoints()
        job = Job(
            self.study,
            self.store,
            self.data,
            self.digest,
            self.compiled,
            self.device,
            checkpoints,
        )
        begun = checkpoints.begun({run.key(self.study, self.digest): run for run in missing})
        labels = {run.label for group in begun for run in group}
        others = [run for run in missing if run.label not in labels]
        if self.device.type == "cpu":
            largest = min(self.group_size, math.ceil(len(missing) / jobs))
            found = execute(job, begun + groups(others, largest), jobs, report)
        else:
            found = job.perform_all(begun, others, report, self.warn)
        for records in found:
            for record in records:
                self.records[record.run.label] = record
                ended(self.study, record, False)

    def checkpoints(self) -> Checkpoints:
        """Those of the folder that are of this device and these versions: bits depend on both."""
        hardware = describe(self.device, self.study.tf32)
        circumstances = json.dumps(
            {
                "format": FORMAT,
                "torch": torch.__version__,
                "gradagree-opt": version("gradagree-opt"),
                "compiled": self.compiled,
                **hardware.model_dump(),
            }
        )
        return Checkpoints(self.store.folder, circumstances, self.checkpoint_seconds)

    def finished(self, run: Run) -> RunRecord | None:
        try:
            record = self.store.read(run.key(self.study, self.digest))
        except DamagedRecordError as damage:
            self.warn(str(damage))
            return None
        return record and record.model_copy(update={"run": run})  # the method may have been renamed
