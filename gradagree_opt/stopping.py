"""What stops a command from outside: SIGTERM as Ctrl-C, and the exit status of both."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ended_as_by_ctrl_c(number: int) -> Iterator[None]:
    """A signal that would end the process at once raises KeyboardInterrupt in the block."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    with _handled(stop, number):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM stop this process when the block is over, and never half-way in it.

    Processes started in here are spared Ctrl-C, which a terminal sends to all of them.
    """
    came: list[int] = []
    try:
        stops = (signal.SIGINT, signal.SIGTERM)
        with _handled(lambda number, _: came.append(number), *stops), _blocked(signal.SIGINT):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


def status(stop: KeyboardInterrupt) -> int:
    """The exit status of a process that a signal has stopped: 128 and its number.

    >>> status(KeyboardInterrupt())
    130
    """
    return 128 + int(stop.args[0] if stop.args else signal.SIGINT)


@contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Has a handler for signals in the block; nothing where Python cannot set or put back one."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) is not None:  # else it is not Python's
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def _blocked(number: int) -> Iterator[None]:
    """Blocked in this thread, and for good in processes that it starts; Windows knows no such."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
