"""Workers of this machine: this process, or new ones, that leave when not wanted any more."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cached_property
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar

from gradagree_opt.ablation.runs.job import Found, Job, Message, Task, Tell, perform
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.training.problem import Problem
from gradagree_opt.stopping import uninterrupted

FORKS = sys.platform == "linux"
"""Where a process may be forked from one that has imported PyTorch: in no time, sharing its memory.

That one has run nothing yet, and leaves with the process that wants it.
"""
IMPORTED = ["torch._dynamo", __name__]


class ThisProcess:
    """Does each task as it is submitted.

    Args:
        hear: Called with what is told on the way.
    """

    at_once: int | None = 1
    deaths: tuple[type[Exception], ...] = ()

    def __init__(self, job: Job, hear: Tell) -> None:
        self.job, self.hear = job, hear

    @cached_property
    def problem(self) -> Problem:
        return self.job.prepare()

    def submit(self, task: Task, /) -> "Future[Found]":
        future: Future[Found] = Future()
        future.set_result(self.job.perform(self.problem, task, self.hear))
        return future

    def listen(self) -> None:
        """Nothing is left to pass on."""

    def __enter__(self) -> "ThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to end."""


class Processes:
    """That many new processes, each of them replaced when it has died.

    Left by an error, it leaves no process behind either.

    Args:
        hear: As for :class:`ThisProcess`.
    """

    deaths: tuple[type[Exception], ...] = (BrokenProcessPool,)

    def __init__(self, job: Job, jobs: int, hear: Tell) -> None:
        self.job, self.hear = pickle.dumps(job), hear
        self.at_once: int | None = jobs
        self.heard = False
        self.idle: list[Process] = []
        self.busy: dict[Future[Found], Process] = {}

    def submit(self, task: Task, /) -> "Future[Found]":
        if hasattr(signal, "pthread_sigmask"):  # starting, it would let Ctrl-C through in the block
            resource_tracker.ensure_running()
        with uninterrupted():  # or a process could be at work that is not among the busy
            return self._submit(task)

    def _submit(self, task: Task) -> "Future[Found]":
        for done in [future for future in self.busy if future.done()]:
            self.idle.append(self.busy.pop(done))
        while self.idle:
            process = self.idle.pop()
            try:
                future = process.submit(self.job, task)
                break
            except BrokenProcessPool:  # it has died, at work or since
                process.end()
        else:
            process = Process()
            future = process.submit(self.job, task)
        self.busy[future] = process
        return future

    def listen(self) -> None:
        """Passes on what processes have told until now.

        Raises:
            StudyError: The first of them has ended without a word.
        """
        for process in self.busy.values():
            for message in process.told():
                self.heard = True
                self.hear(message)
        if not self.heard and any(process.gone for process in self.busy.values()):
            raise StudyError(
                "expected new processes to begin their work, found that one ended before; a script "
                'calls ablate below `if __name__ == "__main__":`, or give jobs=1'
            )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in [*self.idle, *self.busy.values()]:
            process.end(at_once=kind is not None)


class Process:
    """A process of its own, and the line to it, by which each end notices when the other is gone.

    It is a pool of one: where a process of a larger pool dies, the tasks of all of them are lost.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver" if FORKS else "spawn")
        if FORKS:
            context.set_forkserver_preload(IMPORTED)
        self.line, self.other_end = context.Pipe()
        beginning = (self.other_end, dict(os.environ))
        self.executor = ProcessPoolExecutor(1, context, Worker.start, beginning)
        self.started: list[BaseProcess] = []
        self.gone = False

    def submit(self, job: bytes, task: Task) -> "Future[Found]":
        others = multiprocessing.active_children()
        future = self.executor.submit(Worker.perform, job, task)
        self.started += [each for each in multiprocessing.active_children() if each not in others]
        self.other_end.close()  # the process has its own by now
        return future

    def told(self) -> Iterator[Message]:
        """What it has told until now."""
        try:
            while self.line.poll():
                yield self.line.recv()
        except (EOFError, OSError):
            self.gone = True

    def end(self, *, at_once: bool = True) -> None:
        """Waits until it is gone, with the task that it is at or, at once, without."""
        if at_once:
            for process in self.started:
                process.terminate()
        self.executor.shutdown()
        self.line.close()


class Worker:
    """What a new process has of the one that wants it."""

    line: ClassVar["Connection[Message, Any]"]

    @classmethod
    def start(cls, line: "Connection[Message, Any]", variables: dict[str, str]) -> None:
        cls.line = line
        # Neither comes with a fork of a process that was there before.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ.clear()
        os.environ.update(variables)
        threading.Thread(target=cls.leave_with_parent, daemon=True).start()

    @classmethod
    def leave_with_parent(cls) -> None:
        """Ends this process when its parent is gone, even killed."""
        with suppress(EOFError, OSError):
            cls.line.recv()  # nothing is ever sent
        os._exit(1)

    @classmethod
    def perform(cls, job: bytes, task: Task) -> Found:
        cls.line.send(0)  # outer steps: a sign of life
        return perform(job, task, cls.line.send)
