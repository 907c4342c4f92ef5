"""The work of a process: groups of runs, trained, recorded, and saved on the way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gradagree_opt.ablation.runs.processes import Report
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.checkpoint import Checkpoint, Checkpoints
from gradagree_opt.ablation.training.devices import CPU
from gradagree_opt.ablation.training.grouping import groups
from gradagree_opt.ablation.training.problem import Problem, build_problem, data_digest
from gradagree_opt.ablation.training.run import Run, RunRecord, Store
from gradagree_opt.ablation.training.side_by_side import runs_at_once, train_side_by_side
from gradagree_opt.ablation.training.training import Trained, train_runs


@dataclass(frozen=True)
class Job:
    """What a worker process needs to do a group of runs and record them."""

    study: Study
    store: Store
    data: Path | None
    digest: str | None
    compiled: bool
    device: torch.device = CPU
    checkpoints: Checkpoints | None = None

    def prepare(self) -> Problem:
        """The problem, built anew.

        Raises:
            StudyError: Its data are not those that the records are filed under.
        """
        # by the parent's decision; the keys of the runs are those of what the study says
        decided = self.study.model_copy(update={"compile": self.compiled})
        problem = build_problem(decided, self.data, self.device)
        if data_digest(problem) != self.digest:
            raise StudyError(
                "expected the data that the study began with, found others: they were replaced, or "
                "a function of tasksets gives each process other classes (sort what comes of a set)"
            )
        return problem

    def perform(self, problem: Problem, runs: list[Run], report: Report) -> list[RunRecord]:
        trained = train_runs(self.study, problem, runs, report, self.checkpoint(runs))
        return self.recorded(trained)

    def perform_all(
        self,
        begun: list[list[Run]],
        others: list[Run],
        report: Report,
        warn: Callable[[str], None],
    ) -> Iterator[list[RunRecord]]:
        """All runs in this process, those of one method as one program, the methods side by side.

        Args:
            begun: Groups that go on from a checkpoint.
            others: The other runs.
            warn: Called with one sentence for each method whose steps cannot be captured.

        Yields:
            The records of a group, as it ends.
        """
        runs = [run for group in begun for run in group] + others
        if not runs:
            return
        problem = self.prepare()
        at_once = runs_at_once(self.study, problem, runs[0])
        largest = len(runs) if at_once is None else max(1, at_once // 2)
        together = begun + groups(others, largest)
        for trained in train_side_by_side(
            self.study, problem, together, at_once, report, warn, self.checkpoint
        ):
            yield self.recorded(trained)

    def checkpoint(self, runs: list[Run]) -> Checkpoint | None:
        if self.checkpoints is None:
            return None
        return self.checkpoints.of([run.key(self.study, self.digest) for run in runs])

    def recorded(self, trained: Trained) -> list[RunRecord]:
        for record, params in trained:
            self.store.write(record.run.key(self.study, self.digest), record, params)
        records = [record for record, _ in trained]
        if checkpoint := self.checkpoint([record.run for record in records]):
            checkpoint.remove()
        return records
