"""Gives tasks to workers of any kind, and a task whose worker has died to another one."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol, TypeVar, runtime_checkable

from gradagree_opt.ablation.section import StudyError

Task = TypeVar("Task")
Result = TypeVar("Result")
POLL_SECONDS = 0.2
MOST_DEATHS = 3
"""Of workers at one task: so many times it is submitted again."""


@runtime_checkable
class Workers(Protocol):
    """What does tasks: this process, others of this machine, or those of a cluster.

    Attributes:
        at_once: The most tasks that are submitted at a time, None for all.
        deaths: What the future of a task raises whose worker has died.
    """

    at_once: int | None
    deaths: tuple[type[Exception], ...]

    def submit(self, task: Any, /) -> "Future[Any]":
        """Has a worker do the task."""

    def listen(self) -> None:
        """Passes on what workers have told until now."""


def execute(
    workers: Workers,
    tasks: Sequence[Task],
    submit: Callable[[Task], "Future[Result]"],
    name: Callable[[Task], str],
) -> Iterator[Result]:
    """Has the tasks done and yields the results as they come.

    A task whose worker has died is submitted again, three times at most.

    Args:
        submit: Gives a task to the workers, as it is by then.
        name: What a task is called in a sentence.

    Raises:
        StudyError: One task has lost all workers that it was given to.
    """
    waiting = deque(range(len(tasks)))
    pending: dict[Future[Result], int] = {}
    died = [0] * len(tasks)
    while waiting or pending:
        while waiting and (workers.at_once is None or len(pending) < workers.at_once):
            number = waiting.popleft()
            pending[submit(tasks[number])] = number
        done, _ = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
        workers.listen()
        for future in sorted(done, key=lambda each: each.exception() is not None):
            number = pending.pop(future)
            try:
                result = future.result()
            except workers.deaths as death:
                died[number] += 1
                if died[number] > MOST_DEATHS:
                    raise StudyError(
                        f"expected workers that live through {name(tasks[number])}, found that "
                        f"{died[number]} have died of it, killed or crashed; look at their memory"
                    ) from death
                waiting.appendleft(number)
            else:
                yield result
