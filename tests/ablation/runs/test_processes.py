"""What stops a study in the moment in which it starts a process."""

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures.process import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gradagree_opt.ablation.runs.processes import Processes


@pytest.mark.slow
def test_a_process_that_is_at_work_by_then_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ProcessPoolExecutor.submit

    def submit(*arguments: Any) -> Any:
        future = original(*arguments)
        os.kill(os.getpid(), signal.SIGINT)
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    before = multiprocessing.active_children()
    job: Any = "none that it could begin before it is ended"
    with pytest.raises(KeyboardInterrupt), Processes(job, 1, print) as processes:
        processes.submit(job)
    assert multiprocessing.active_children() == before


INTERRUPTED = """
import os, signal, threading
from concurrent.futures.process import ProcessPoolExecutor
from gradagree_opt.ablation.runs.processes import Processes

original = ProcessPoolExecutor.submit

def submit(*arguments):  # which waits until the first of the new processes has imported PyTorch
    threading.Timer(1, os.killpg, (0, signal.SIGINT)).start()
    return original(*arguments)

ProcessPoolExecutor.submit = submit
if __name__ == "__main__":
    try:
        with Processes("none that it could begin", 1, print) as processes:
            processes.submit("none")
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX")
def test_ctrl_c_while_new_processes_import_is_no_traceback_of_theirs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script)]
    ended = subprocess.run(
        command, capture_output=True, text=True, start_new_session=True, check=True
    )
    assert (ended.stdout, ended.stderr) == ("stopped\n", "")
