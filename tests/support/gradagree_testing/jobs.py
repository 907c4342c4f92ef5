"""Jobs that are not a study's, where processes of their own can import them."""

import os
import signal
from pathlib import Path
from typing import Any

from gradagree_opt.ablation.runs.job import Job, Task, Tell
from gradagree_opt.ablation.section import StudyError


def task_of(name: str) -> Task:
    """A task that a job below knows by its name."""
    return Task([], name.encode())


class Failing(Job):
    """A job that cannot be prepared."""

    def __init__(self) -> None:
        """Without a study."""

    def prepare(self) -> Any:
        raise StudyError("the data are gone")


class Marking(Job):
    """A job whose tasks leave a mark in a folder, and kill their process as their names say."""

    def __init__(self, folder: Path) -> None:
        object.__setattr__(self, "folder", folder)

    def prepare(self) -> Any:
        """Nothing is shared."""

    def perform(self, problem: Any, task: Task, tell: Tell) -> Any:
        assert task.saved is not None
        name = task.saved.decode()
        mark = self.folder / name
        with mark.open("a") as file:
            file.write(".")
        if name == "killed always" or (name == "killed once" and mark.read_text() == "."):
            os.kill(os.getpid(), signal.SIGKILL)
        return name
