"""The runs of a study: every method tuned on as many outer rates, then run on every seed."""

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import product, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Generator

from gradagree_opt.ablation.runs.engines import Settings, train
from gradagree_opt.ablation.runs.job import Job, Message, Saved, Task, circumstances
from gradagree_opt.ablation.runs.nodes import Node
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.checkpoint import Checkpoints
from gradagree_opt.ablation.training.devices import CPU, describe
from gradagree_opt.ablation.training.grouping import compiles, group_size
from gradagree_opt.ablation.training.problem import build_problem, data_digest
from gradagree_opt.ablation.training.run import DamagedRecordError, Run, RunRecord, Store
from gradagree_opt.ablation.training.training import Report
from gradagree_opt.ablation.training.trial import check_memory, try_problem

if TYPE_CHECKING:
    from gradagree_opt.ablation.runs.cluster import Cluster

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
        beyond = float(f"{best * best / neighbour:.4g}")  # 0.3333 is easily typed again
        if beyond in rates or not 0 < beyond < math.inf:  # four digits lead no further
            break
        rates.append(beyond)
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


def check_apart(data: Path, out: Path) -> None:
    """Raises a StudyError where records would be written among the data that are hashed."""
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise StudyError(
            f"--data {data} holds the output folder {out}, so that every record would change the "
            "data; give a folder that has the data alone, or another --out"
        )


class Sweep:
    """The runs of a study in its output folder, those that are finished left as they are.

    Args:
        warn: Called with one sentence for each record that is damaged, and for each method whose
            steps on a GPU take longer than they could.
        device: What its runs are trained on.
        checkpoint_seconds: From one saved state of a group of runs to the next, from which it is
            resumed if its process is killed.
        cluster: Where they are trained; None for this machine.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        data: Path | None,
        warn: Callable[[str], None],
        device: torch.device = CPU,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        cluster: "Cluster | None" = None,
    ) -> None:
        self.study, self.data, self.warn, self.device = study, data, warn, device
        self.checkpoint_seconds, self.cluster = checkpoint_seconds, cluster
        self.store = Store(folder)
        check_methods(study)
        if data is not None and study.tasks.drawn_alone:
            check_apart(data, folder)
        if cluster is None:
            check_memory(study, device)
        problem = build_problem(study, data)
        try_problem(study, problem)
        self.digest = data_digest(problem)
        self.group_size = group_size(study, problem.module)
        self.records: dict[Label, RunRecord] = {}

    @cached_property
    def compiled(self) -> bool:
        """As :func:`compiles` says, which is asked once: the parts of a study share its answer."""
        return compiles(self.study, self.warn, self.device)

    @cached_property
    def nodes(self) -> list[Node]:
        """What its runs are trained on, compared with this machine where they are others."""
        if self.cluster is None:
            return [Node(describe(self.device, self.study.tf32), None)]
        return self.cluster.look(self.job(), tuning_runs(self.study)[0])

    @property
    def iterations(self) -> int:
        """The outer steps of the whole study, finished runs included, as far as is known."""
        return self.study.iterations * number_of_runs(self.study, self.records)

    def run(self, jobs: int, report: Report, ended: Ended = lambda *_: None) -> Part:
        """Does what is missing, with that many processes; on a GPU of this machine with one.

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
        missing = self.find(runs, ended)
        if not missing:
            return
        job, checkpoints = self.job(), self.checkpoints()
        begun = checkpoints.begun(dict(zip(job.keys(missing), missing, strict=True)))
        labels = {run.label for group in begun for run in group}
        others = [run for run in missing if run.label not in labels]

        def build_task(group: list[Run]) -> Task:
            return Task(group, checkpoints.of(job.keys(group)).load())

        def hear(message: Message) -> None:
            if isinstance(message, Saved):
                checkpoints.of(message.keys).keep(message.content)
            elif isinstance(message, str):
                self.warn(message)
            else:
                report(message)

        largest = self.largest(math.ceil(len(missing) / jobs))
        settings = Settings(jobs, largest, self.cluster)
        with closing(train(job, begun, others, build_task, hear, settings)) as results:
            for found in results:
                keys = job.keys([record.run for record, _ in found])
                for key, (record, params) in zip(keys, found, strict=True):
                    self.store.write(key, record, params)
                checkpoints.of(keys).remove()
                for record, _ in found:
                    self.records[record.run.label] = record
                    ended(self.study, record, False)

    def find(self, runs: list[Run], ended: Ended) -> list[Run]:
        """Reads the records of the runs that are finished, and gives the others."""
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
        return missing

    def largest(self, even: int) -> int:
        """The most runs in a group, where the runs dealt out evenly make groups of ``even``."""
        of_gpus = [node.at_once for node in self.nodes if node.at_once is not None]
        return min(even, *(of_gpus or [self.group_size]))

    def job(self) -> Job:
        """What is done wherever its runs are trained."""
        data = None if self.data is None else self.data.resolve()
        seconds, compiled = self.checkpoint_seconds, self.compiled
        return Job(self.study, data, self.digest, compiled, self.device, seconds)

    def checkpoints(self) -> Checkpoints:
        """The checkpoints of the folder, as far as they are of this hardware and these versions."""
        here = circumstances(self.compiled, self.nodes[0].hardware)
        return Checkpoints(self.store.folder, here, self.checkpoint_seconds)

    def finished(self, run: Run) -> RunRecord | None:
        try:
            return self.store.read(run, self.study, self.digest)
        except DamagedRecordError as damage:
            self.warn(str(damage))
            return None
