"""What stops a study in the moment in which it starts a process."""

import multiprocessing
import os
import signal
from concurrent.futures.process import ProcessPoolExecutor
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
