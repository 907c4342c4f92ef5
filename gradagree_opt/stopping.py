"""What stops a command from outside: SIGTERM as Ctrl-C, and the exit status of both."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_as_by_ctrl_c(number: int) -> Iterator[None]:
    """A signal that would end the process at once raises KeyboardInterrupt in the block."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, previous)


def status(stop: KeyboardInterrupt) -> int:
    """The exit status of a process that a signal has stopped: 128 and its number.

    >>> status(KeyboardInterrupt())
    130
    """
    return 128 + int(stop.args[0] if stop.args else signal.SIGINT)
