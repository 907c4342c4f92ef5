"""Studies in processes of their own: stopped, killed at any moment, and two in one folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import pytest

from gradagree_opt.ablation.training.run import RunRecord

from ..conftest import WriteStudy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux"),
]
CODE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs with "&"
from gradagree_opt.cli import app
app()
"""
# Tables are compared here, and no figures.
WITHOUT_FIGURES = """
from gradagree_opt.ablation.report import artefacts
artefacts.draw = lambda *_: {}
"""
# A study that draws for ever is killed before it has ended, however busy the machine.
NEVER_ENDING = """
import time
from gradagree_opt.ablation.report import artefacts
artefacts.draw = lambda *_: time.sleep(600)
"""
# As on a slow disk, and as a study that reads large data.
IMPORTING = """
import pathlib, sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == "gradagree_opt.ablation.commands":
            pathlib.Path({!r}).touch()
            time.sleep(600)
sys.meta_path.insert(0, Slow())
"""
PREPARING = """
import pathlib, time
from gradagree_opt.ablation import conduct
def prepare_folder(*_):
    pathlib.Path({!r}).touch()
    time.sleep(600)
conduct.prepare_folder = prepare_folder
"""
RUNS = 9
TABLES = ["table.md", "table.tex", "methods.md", "references.bib"]

Process: TypeAlias = "subprocess.Popen[str]"
Start: TypeAlias = Callable[..., Process]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts the command in a session of its own; whatever is left of it is killed at the end."""
    started: list[Process] = []

    def start(study: Path, out: Path, jobs: int = 2, before: str = WITHOUT_FIGURES) -> Process:
        command = [sys.executable, "-c", before + CODE, "ablate", str(study), "--out", str(out)]
        process = subprocess.Popen(
            [*command, "--jobs", str(jobs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for(process: Process, arrived: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while True:
        ended = process.poll() is not None  # asked first: its last act may be what is waited for
        if arrived():
            return
        assert not ended, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process: Process) -> str:
    """What it says on stderr, having ended well."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def records(out: Path) -> dict[Path, int]:
    """The records and when they were written; all of them are whole."""
    found = {}
    for path in out.glob("runs/*.json"):
        RunRecord.model_validate_json(path.read_bytes())
        found[path] = path.stat().st_mtime_ns
    return found


def members(session: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            pids.append(int(stat.parent.name))
    return pids


def left_over(session: int) -> list[int]:
    """The processes of a session that are still running after twenty seconds to end in."""
    deadline = time.monotonic() + 20
    while (pids := members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return pids


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny study with nine runs of half a second or so."""
    from ..conftest import TINY

    path = tmp_path_factory.mktemp("longer") / "tiny.yaml"
    path.write_text(TINY.replace("iterations: 5", "iterations: 100"))
    return path


@pytest.fixture(scope="module")
def undisturbed(start: Start, longer: Path) -> Path:
    """The output folder of that study, run from beginning to end."""
    out = longer.parent / "undisturbed"
    finish(start(longer, out, jobs=1))
    assert len(records(out)) == RUNS
    return out


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before", [IMPORTING, PREPARING], ids=["importing", "preparing"])
def test_stopped_before_it_trains_it_says_so_and_has_written_nothing(
    start: Start, longer: Path, tmp_path: Path, by: signal.Signals, before: str
) -> None:
    out, preparing = tmp_path / "out", tmp_path / "preparing"
    process = start(longer, out, before=before.format(str(preparing)))
    wait_for(process, preparing.exists)
    process.send_signal(by)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + by
    assert errors.startswith("stopped while nothing was being trained")
    assert errors.count("\n") == 1 and not out.exists()


def test_sigterm_keeps_finished_runs_as_ctrl_c_does(
    start: Start, longer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(longer, out)
    wait_for(process, lambda: len(records(out)) > 0)
    process.terminate()  # as a scheduler does: to the first process
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "gradagree ablate" in errors and str(out) in errors and "Traceback" not in errors
    assert left_over(process.pid) == []
    assert 0 < len(records(out)) < RUNS


def test_ctrl_c_keeps_finished_runs_and_the_same_command_goes_on(
    start: Start, longer: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(longer, out)
    wait_for(process, lambda: len(records(out)) > 0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "gradagree ablate" in errors and str(out) in errors and "Traceback" not in errors
    assert left_over(process.pid) == []
    kept = records(out)
    assert 0 < len(kept) < RUNS
    assert "cut off" not in finish(start(longer, out, jobs=1))
    assert kept.items() <= records(out).items()
    assert tables(out) == tables(undisturbed)


def test_killed_at_any_moment_a_study_loses_the_runs_in_flight_and_nothing_else(
    start: Start, longer: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def kill_parent(process: Process) -> None:
        process.kill()

    def kill_all(process: Process) -> None:
        os.killpg(process.pid, signal.SIGKILL)

    def kill_workers(process: Process) -> None:
        deadline = time.monotonic() + 60
        while process.poll() is None:  # the next ones too, where these were at their end anyway
            assert time.monotonic() < deadline
            for pid in members(process.pid):
                if pid != process.pid:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    for kill, jobs, moment in (
        (kill_all, 1, lambda: out.exists()),
        (kill_parent, 2, lambda: len(list(out.glob("runs/*.npz"))) > 0),
        (kill_workers, 2, lambda: len(records(out)) > 3),
        (kill_all, 2, lambda: len(records(out)) > 6),
        (kill_parent, 1, lambda: (out / "results.csv").exists()),
    ):
        before = records(out)
        process = start(longer, out, jobs, before=NEVER_ENDING)
        wait_for(process, moment)
        reached = records(out)
        kill(process)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert left_over(process.pid) == []
        assert before.items() <= reached.items() <= records(out).items(), "a finished run is lost"
    kept = records(out)
    assert "cut off" not in finish(start(longer, out, jobs=1))
    assert kept == records(out) and len(kept) == RUNS
    assert tables(out) == tables(undisturbed)


def test_two_sweeps_in_one_folder_at_once_both_end_as_one_alone(
    start: Start, longer: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for process in [start(longer, out, jobs) for jobs in (2, 1)]:
        assert "cut off" not in finish(process)
    assert len(records(out)) == RUNS
    assert tables(out) == tables(undisturbed)
    assert not list(out.rglob(".*"))


def test_of_two_studies_in_one_folder_at_once_one_is_refused(
    start: Start, write_study: WriteStudy, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    studies = []
    for name in ("first", "second"):
        studies.append(tmp_path / f"{name}.yaml")
        write_study(name=name).rename(studies[-1])
    processes = [start(study, out, 1) for study in studies]
    said = [process.communicate(timeout=300)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2], said
    winner = codes.index(0)
    refused = said[1 - winner].strip()
    own, other = ("first", "second") if winner == 0 else ("second", "first")
    assert refused.endswith(f"holds the study {own!r}, not {other!r}; give another --out")
    assert "\n" not in refused and f'"name": "{own}"' in (out / "config.json").read_text()
    assert len(records(out)) == RUNS
