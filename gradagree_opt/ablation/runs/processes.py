"""Runs spread over processes that report how far they are and leave when not wanted any more."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

Report = Callable[[int], None]
Task = TypeVar("Task", contravariant=True)
Result = TypeVar("Result", covariant=True)
Context = TypeVar("Context")
POLL_SECONDS = 0.2


@runtime_checkable
class Job(Protocol[Context, Task, Result]):
    """What each process prepares once, and then performs for one task after another."""

    def prepare(self) -> Context:
        """What all tasks of a process share."""

    def perform(self, context: Context, task: Task, report: Report, /) -> Result:
        """One task, its progress reported on the way."""


def execute(
    job: Job[Context, Task, Result], tasks: Sequence[Task], jobs: int, report: Report, /
) -> Iterator[Result]:
    """Performs the tasks and yields their results as they come.

    With one job they are done in this process, otherwise in that many new ones. However the loop
    over the results ends, no process is left behind.
    """
    if not tasks:
        return
    if jobs == 1:
        context = job.prepare()
        for task in tasks:
            yield job.perform(context, task, report)
        return
    others = multiprocessing.active_children()
    spawn = multiprocessing.get_context("spawn")
    progress: multiprocessing.Queue[int] = spawn.Queue()
    executor = ProcessPoolExecutor(min(jobs, len(tasks)), spawn, Worker.start, (job, progress))
    finished = False
    try:
        with interrupts_for_parent_only():
            pending: set[Future[Any]] = {executor.submit(Worker.perform, task) for task in tasks}
        while pending:
            done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            results = [future.result() for future in done]
            for steps in waiting(progress):
                report(steps)
            yield from results
        finished = True
    finally:
        if not finished:
            for process in set(multiprocessing.active_children()).difference(others):
                process.terminate()
        executor.shutdown(wait=finished, cancel_futures=True)


def waiting(progress: "multiprocessing.Queue[int]") -> Iterator[int]:
    while True:
        try:
            yield progress.get_nowait()
        except queue.Empty:
            return


@contextmanager
def interrupts_for_parent_only() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C, which a terminal sends to all of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class Worker:
    """The job of this process, and what it prepared."""

    job: ClassVar[Job[Any, Any, Any]]
    context: ClassVar[Any]
    report: ClassVar[Report]

    @classmethod
    def start(cls, job: Job[Any, Any, Any], progress: "multiprocessing.Queue[int]") -> None:
        threading.Thread(target=leave_with_parent, daemon=True).start()
        cls.job, cls.report = job, progress.put

    @classmethod
    def perform(cls, task: Any) -> Any:
        if not hasattr(cls, "context"):  # not in start, whose errors do not reach the parent
            cls.context = cls.job.prepare()
        return cls.job.perform(cls.context, task, cls.report)


def leave_with_parent() -> None:
    """Ends this process when its parent is gone, even killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
