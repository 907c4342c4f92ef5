"""The engine that a study is run by: refused in one sentence, and a cluster of its own ended."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from gradagree_opt.ablation import ablate as ablate_in_python
from gradagree_opt.frameworks import FRAMEWORKS
from gradagree_testing.command import contents

from .conftest import TINY, ablate


def test_without_ray_one_sentence_names_the_extra(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "gradagree_opt.ablation.runs.cluster", raising=False)
    before = contents(tmp_path)
    result = ablate(tiny, "--out", tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 2 and "\n" not in result.stderr.strip()
    expected = f"ray{FRAMEWORKS['ray'].supported}"
    assert result.stderr.startswith(f"gradagree: the engine ray: expected {expected}, found none; ")
    assert result.stderr.strip().endswith("pip install 'gradagree-opt[ray]'")
    assert contents(tmp_path) == before


def test_an_address_for_another_engine_and_an_unknown_engine_are_refused(
    tiny: Path, tmp_path: Path
) -> None:
    result = ablate(tiny, "--out", tmp_path / "out", "--ray-address", "auto")
    assert result.exit_code == 2
    assert result.stderr == "gradagree: the Ray address 'auto' is for the engine ray; give both\n"
    assert ablate(tiny, "--engine", "dask").exit_code == 2
    with pytest.raises(ValueError, match="engine to be one of 'local', 'ray'; found 'dask'"):
        ablate_in_python(tiny, out=tmp_path / "out", engine="dask")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_at_which_nobody_listens_is_refused_at_once(
    tiny: Path, tmp_path: Path, scheme: str
) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{free.getsockname()[1]}"
        out = tmp_path / "out"
        result = ablate(tiny, "--out", out, "--engine", "ray", "--ray-address", address)
    assert result.exit_code == 2 and "\n" not in result.stderr.strip()
    assert f"expected a Ray cluster at {address}, found none: " in result.stderr
    assert not out.exists()


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a cluster of the command's own has its files; a process of it has its name around."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # paths of sockets must be short
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    for pid in processes_around(folder):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def processes_around(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


needs_linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")


class Ended(NamedTuple):
    """A study by Ray that a signal has ended."""

    study: Path
    out: Path
    status: int
    errors: str

    def records(self) -> dict[Path, int]:
        """And when they were written."""
        return {path: path.stat().st_mtime_ns for path in self.out.glob("runs/*.json")}


def end_early(folder: Path, ray_folder: Path, by: signal.Signals) -> Ended:
    """Ends it as soon as a run has been recorded; nothing of its cluster is left."""
    study, out = folder / "tiny.yaml", folder / "out"
    study.write_text(TINY.replace("iterations: 5", "iterations: 200\ncompile: false"))
    command = [sys.executable, "-m", "gradagree_opt", "ablate", str(study), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--engine", "ray"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("runs/*.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    if by == signal.SIGTERM:  # as a scheduler does
        process.terminate()
    else:  # as a terminal does: to all processes
        os.killpg(process.pid, by)
    _, errors = process.communicate(timeout=120)
    while processes_around(ray_folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_around(ray_folder) == []
    ended = Ended(study, out, process.returncode, errors)
    assert 0 < len(ended.records()) < 15
    return ended


@needs_linux
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_says_how_to_go_on_and_leaves_no_cluster(
    tmp_path: Path, ray_folder: Path, by: signal.Signals
) -> None:
    pytest.importorskip("ray")
    ended = end_early(tmp_path, ray_folder, by)
    assert ended.status == 128 + by, ended.errors
    assert "picks up where it left off" in ended.errors and "Traceback" not in ended.errors


@needs_linux
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("without_figures")
def test_one_that_is_killed_leaves_no_cluster_and_goes_on_without_one(
    tmp_path: Path, ray_folder: Path
) -> None:
    pytest.importorskip("ray")
    ended = end_early(tmp_path, ray_folder, signal.SIGKILL)
    assert ended.status == -signal.SIGKILL
    kept = ended.records()
    result = ablate(ended.study, "--out", ended.out, "--jobs", 1)
    assert result.exit_code == 0, result.stderr
    assert kept.items() <= ended.records().items() and len(ended.records()) == 15
