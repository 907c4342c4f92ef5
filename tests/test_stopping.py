"""What stops a command, in a block that is not to be left half-way."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

import pytest

from gradagree_opt.stopping import ended_as_by_ctrl_c, status, uninterrupted

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX")


def send(
    *signals: signal.Signals, error: Exception | None = None, then: Callable[[], None] = print
) -> None:
    """To this process, in a block that is not interrupted, goes on, and ends by the error."""
    with uninterrupted():
        for number in signals:
            os.kill(os.getpid(), number)
        then()
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [None, BrokenProcessPool("as when it cannot start")])
@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT,) * 2])
def test_what_stops_a_study_while_a_process_starts_does_so_afterwards(
    signals: tuple[signal.Signals, ...], error: Exception | None
) -> None:
    reached: list[bool] = []
    with ended_as_by_ctrl_c(signal.SIGTERM):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(KeyboardInterrupt) as caught:
            send(*signals, error=error, then=lambda: reached.append(True))
        assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert reached and status(caught.value) == 128 + signals[0]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_where_a_caller_ignores_ctrl_c_it_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.slow
def test_a_process_that_is_started_meanwhile_goes_on() -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('went on')"

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1)

    with uninterrupted():
        spared = start()
    other = start()
    assert spared.communicate()[0] == b"went on\n"
    assert other.communicate()[0] == b""
