"""The work of a process: it trains groups of runs, and reports to the one that records them."""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import torch

from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.checkpoint import Sent
from gradagree_opt.ablation.training.devices import CPU, Hardware, describe
from gradagree_opt.ablation.training.grouping import groups
from gradagree_opt.ablation.training.problem import Problem, build_problem, data_digest
from gradagree_opt.ablation.training.run import FORMAT, Run, RunRecord, archive
from gradagree_opt.ablation.training.side_by_side import runs_at_once, train_side_by_side
from gradagree_opt.ablation.training.training import Trained, train_runs

Found: TypeAlias = list[tuple[RunRecord, bytes]]
"""The record of each run of a group, and the file of its parameters."""


@dataclass(frozen=True)
class Task:
    """A group of runs of one method, to be trained.

    Attributes:
        saved: The state that it is resumed from; None to begin anew.
    """

    runs: list[Run]
    saved: bytes | None = None


@dataclass(frozen=True)
class Saved:
    """The state of a group, from which it is resumed if its process is killed.

    Attributes:
        keys: Of its runs.
    """

    keys: list[str]
    content: bytes


Message: TypeAlias = int | str | Saved
"""What a process reports: outer steps that it has done, a warning, or a state to keep."""
Tell: TypeAlias = Callable[[Message], None]


def circumstances(compiled: bool, hardware: Hardware) -> str:
    """What the bits of a run depend on besides the study: hardware and versions."""
    return json.dumps(
        {
            "format": FORMAT,
            "torch": torch.__version__,
            "gradagree-opt": version("gradagree-opt"),
            "compiled": compiled,
            **hardware.model_dump(),
        }
    )


@dataclass(frozen=True)
class Job:
    """What a process needs to do groups of runs.

    Attributes:
        data: An absolute path.
        digest: Of the data; a part of the keys that records are filed under.
        compiled: Whether steps are compiled, as the process that records them has decided.
        seconds: From one saved state of a group to the next; None for no states.
    """

    study: Study
    data: Path | None
    digest: str | None
    compiled: bool
    device: torch.device = CPU
    seconds: float | None = None

    def prepare(self) -> Problem:
        """The problem, built anew.

        Raises:
            StudyError: Its data are not those that the records are filed under.
        """
        # as decided for all processes; the keys of runs depend on what the study itself says
        decided = self.study.model_copy(update={"compile": self.compiled})
        problem = build_problem(decided, self.data, self.device)
        if data_digest(problem) != self.digest:
            raise StudyError(
                "expected the data that the study began with, found others: they were replaced, or "
                "a function of tasksets gives each process other classes (sort what comes of a set)"
            )
        return problem

    def perform(self, problem: Problem, task: Task, tell: Tell) -> Found:
        """Trains a group; on a GPU, as one program."""
        if self.device.type == "cpu":
            states = self.states(task, tell)
            return archived(train_runs(self.study, problem, task.runs, tell, states))
        [trained] = self.side_by_side(problem, [task], None, tell)
        return archived(trained)

    def perform_all(self, begun: Sequence[Task], others: list[Run], tell: Tell) -> Iterator[Found]:
        """All runs in this process, those of one method as one program, the methods side by side.

        Args:
            begun: Groups that go on from what was saved.
            others: The other runs.

        Yields:
            What a group finds, as it ends.
        """
        runs = [run for task in begun for run in task.runs] + others
        if not runs:
            return
        problem = self.prepare()
        at_once = runs_at_once(self.study, problem, runs[0])
        largest = len(runs) if at_once is None else max(1, at_once // 2)
        tasks = [*begun, *map(Task, groups(others, largest))]
        yield from map(archived, self.side_by_side(problem, tasks, at_once, tell))

    def side_by_side(
        self, problem: Problem, tasks: Sequence[Task], at_once: int | None, tell: Tell
    ) -> Iterator[Trained]:
        by_first = {task.runs[0].label: task for task in tasks}
        return train_side_by_side(
            self.study,
            problem,
            [task.runs for task in tasks],
            at_once,
            tell,
            tell,
            lambda runs: self.states(by_first[runs[0].label], tell),
        )

    def states(self, task: Task, tell: Tell) -> Sent | None:
        """Where the group reads the state that it is resumed from, and sends later ones."""
        if self.seconds is None:
            return None
        keys = self.keys(task.runs)
        here = circumstances(self.compiled, describe(self.device, self.study.tf32))

        def send(content: bytes) -> None:
            tell(Saved(keys, content))

        return Sent(keys, here, self.seconds, task.saved, send)

    def keys(self, runs: Sequence[Run]) -> list[str]:
        return [run.key(self.study, self.digest) for run in runs]


def archived(trained: Trained) -> Found:
    """Records and files of parameters: tensors would be shared by processes through files."""
    return [(record, archive(params)) for record, params in trained]


@lru_cache(maxsize=1)
def prepared(job: bytes) -> tuple[Job, Problem]:
    """A pickled job and its problem, for all groups of it that this process does."""
    found: Job = pickle.loads(job)
    return found, found.prepare()


def perform(job: bytes, task: Task, tell: Tell) -> Found:
    """A group of runs of a pickled job, in the process that is to do it."""
    found, problem = prepared(job)
    return found.perform(problem, task, tell)
