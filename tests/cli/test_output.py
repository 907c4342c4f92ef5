"""What the command prints, on a full disk and to a reader who has gone: one sentence, status 1."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from gradagree_opt.cli import app
from gradagree_testing.command import TIMED, contents, gradagree

FULL = Path("/dev/full")


KINDS = pytest.mark.parametrize("kind", ["full", "gone"])


def unwritable(kind: str) -> TextIO:
    if kind == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        return os.fdopen(writer, "w")
    if not FULL.exists():
        pytest.skip("needs Linux")
    return FULL.open("w")


def refused(kind: str, capfd: pytest.CaptureFixture[str], *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch, unwritable(kind) as file:
        patch.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit) as end:
            app(list(map(str, arguments)))
    assert end.value.code == 1
    sentence = capfd.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("gradagree: what it prints cannot be written: ")


@KINDS
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["ablate", "--list"], []])
def test_help_and_lists_that_cannot_be_printed_end_in_one_sentence(
    capfd: pytest.CaptureFixture[str], kind: str, arguments: list[str]
) -> None:
    refused(kind, capfd, *arguments)


@KINDS
@pytest.mark.usefixtures("without_figures")
def test_a_study_whose_table_cannot_be_printed_has_all_its_files(
    finished: Path, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "out"
    refused(kind, capfd, "ablate", tiny, "--out", out, "--jobs", 1)
    written = {name.removeprefix(str(out)): found for name, found in contents(out).items()}
    for name in ("table.md", "results.csv", "methods.md", "references.bib"):
        assert written[f"/{name}"] == (finished / name).read_bytes()
    refused(kind, capfd, "report", out)
    refused(kind, capfd, "cite", out)
    again = {name.removeprefix(str(out)): found for name, found in contents(out).items()}
    timed = {f"/{name}" for name in TIMED}
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in written.items() if k not in timed
    }


@KINDS
@pytest.mark.usefixtures("without_figures")
def test_a_study_whose_progress_cannot_be_written_is_run_to_its_end(
    finished: Path, tiny: Path, tmp_path: Path, kind: str
) -> None:
    with pytest.MonkeyPatch.context() as patch, unwritable(kind) as file:
        patch.setattr(sys, "stderr", file)
        with pytest.raises(SystemExit) as end:
            app(["ablate", str(tiny), "--out", str(tmp_path / "out"), "--jobs", "1"])
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # what it holds goes there
    assert end.value.code == 0
    assert (tmp_path / "out/table.md").read_bytes() == (finished / "table.md").read_bytes()


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("columns", ["0", "1", "25"])
def test_a_narrow_terminal_loses_no_digit(
    finished: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    narrow = digits(gradagree("report", finished).stdout)
    monkeypatch.setenv("COLUMNS", "200")
    assert narrow == digits(gradagree("report", finished).stdout) and len(narrow) > 50


def digits(shown: str) -> list[str]:
    """Those of the table, in no order: a narrow one has them below each other."""
    return sorted(re.findall(r"\d", shown.partition("Tiny")[0]))


@pytest.mark.slow
def test_a_process_of_its_own_says_no_more_at_its_end() -> None:
    program = [sys.executable, "-m", "gradagree_opt", "--help"]
    with FULL.open("w") as full:
        found = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "-", *program], capture_output=True, text=True)
    assert closed.returncode in (0, 1) and "Traceback" not in closed.stderr
