"""The command on a terminal: its help and examples, completion, colours, exit status."""

import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup
from typer.testing import CliRunner

import gradagree_opt
from gradagree_opt.ablation.runs.sweep import CHECKPOINT_SECONDS
from gradagree_opt.ablation.study.loading import shipped
from gradagree_opt.cli import app, complete_study
from gradagree_testing.forked import Program

ROOT = typer.main.get_command(app)
assert isinstance(ROOT, TyperGroup)
COMMANDS = ROOT.commands
EXAMPLES = re.findall(
    r"^gradagree .*$", "\n".join(str(c.epilog) for c in [ROOT, *COMMANDS.values()]), re.MULTILINE
)
MAIN = Path(gradagree_opt.__path__[0]) / "__main__.py"
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def run(output: Path, *arguments: str, **variables: str) -> int:
    """The command in a process of its own that prints there; its exit status."""
    unset = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}
    return Program(MAIN, *arguments, output=output, environment=unset | variables).finish()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example_of_it(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], terminal_width=100).stdout
    assert re.search(rf"^ *gradagree {name}\b", shown.partition("Examples:")[2], re.MULTILINE)
    assert not re.search(r"\.{3}\S*\.{3}", shown)  # of several folders, said once


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_command_line_that_is_understood(example: str) -> None:
    _, name, *arguments = example.partition(" >")[0].split()
    if "--list" not in arguments:  # which prints at once
        context = COMMANDS[name].make_context(name, arguments)
        if "study" in context.params:
            assert context.params["study"] in shipped()


@pytest.mark.slow
def test_help_and_version_import_nothing_that_takes_long() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from gradagree_opt.cli import app;"
        "assert CliRunner().invoke(app, ['ablate', '--help']).exit_code == 0;"
        "assert CliRunner().invoke(app, ['--version']).exit_code == 0;"
        "print({'torch', 'numpy', 'pandas', 'scipy', 'matplotlib', 'yaml'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "set()\n", found.stderr


def test_the_help_names_the_checkpoint_interval_that_is_used() -> None:
    [option] = [p for p in COMMANDS["ablate"].params if p.name == "checkpoint_seconds"]
    assert float(str(getattr(option, "show_default"))) == CHECKPOINT_SECONDS  # noqa: B009 - untyped


def test_studies_are_completed_by_their_names() -> None:
    assert complete_study("") == sorted(shipped())
    assert complete_study("sine-m") == ["sine-maml"]
    assert complete_study("none such") == []


@pytest.mark.slow
def test_a_shell_is_given_the_completions(tmp_path: Path) -> None:
    words = {"COMP_WORDS": "gradagree ablate sine-m", "COMP_CWORD": "2"}
    run(tmp_path / "said", _GRADAGREE_COMPLETE="complete_bash", **words)
    assert (tmp_path / "said").read_text().split() == ["sine-maml"]


@pytest.mark.slow
def test_a_file_gets_no_colours(tmp_path: Path) -> None:
    for arguments in ([], ["--help"], ["ablate", "--help"], ["ablate", "--list"]):
        run(tmp_path / "said", *arguments, TERM="xterm-256color")
        said = (tmp_path / "said").read_text()
        assert said and not COLOUR.search(said)


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}], ids=["colours", "NO_COLOR"])
def test_a_terminal_gets_colours_unless_they_are_unwanted(variables: dict[str, str]) -> None:
    terminal, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while chunk := os.read(terminal, 1 << 16):
                shown.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    status = run(Path(os.ttyname(theirs)), "--help", TERM="xterm-256color", **variables)
    os.close(theirs)
    reader.join()
    os.close(terminal)
    assert status == 0
    codes = {code for found in COLOUR.findall(shown.decode()) for code in found[2:-1].split(";")}
    coloured = any(code.isdigit() and 30 <= int(code) <= 38 for code in codes)
    assert coloured == (not variables)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--version"], 0),
        (["ablate", "--list"], 0),
        (["ablate"], 2),
        (["no-such-command"], 2),
        (["ablate", "sine", "--jobs", "0"], 2),
        (["ablate", "sine", "--seeds", "x"], 2),
        (["report", "no-such-folder"], 2),
        (["cite", "no-such-folder"], 2),
    ],
)
def test_the_exit_status_tells_whether_something_was_done(
    arguments: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, arguments).exit_code == status
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_module_is_the_command() -> None:
    program = [sys.executable, "-m", "gradagree_opt", "--version"]
    found = subprocess.run(program, capture_output=True, text=True, check=True)
    assert found.stdout == CliRunner().invoke(app, ["--version"]).stdout
