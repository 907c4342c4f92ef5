"""The command on a terminal: its help and examples, completion, colours, exit status."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup
from typer.testing import CliRunner

from gradagree_opt.ablation.runs.sweep import CHECKPOINT_SECONDS
from gradagree_opt.ablation.study.loading import shipped
from gradagree_opt.cli import app, complete_study

ROOT = typer.main.get_command(app)
assert isinstance(ROOT, TyperGroup)
COMMANDS = ROOT.commands
EXAMPLES = re.findall(
    r"^gradagree .*$", "\n".join(str(c.epilog) for c in [ROOT, *COMMANDS.values()]), re.MULTILINE
)
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, its output in a pipe."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "gradagree_opt", *arguments],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example_of_it(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], terminal_width=100).stdout
    assert re.search(rf"^ *gradagree {name}\b", shown.partition("Examples:")[2], re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_command_line_that_is_understood(example: str) -> None:
    _, name, *arguments = example.partition(" >")[0].split()
    if "--list" not in arguments:  # which prints at once
        context = COMMANDS[name].make_context(name, arguments)
        if "study" in context.params:
            assert context.params["study"] in shipped()


def test_help_and_version_import_nothing_that_only_a_study_needs() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from gradagree_opt.cli import app;"
        "assert CliRunner().invoke(app, ['ablate', '--help']).exit_code == 0;"
        "assert CliRunner().invoke(app, ['--version']).exit_code == 0;"
        "print({'pandas', 'scipy', 'matplotlib', 'sklearn', 'yaml'} & set(sys.modules))"
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


def test_a_shell_is_given_the_completions() -> None:
    found = run(
        _GRADAGREE_COMPLETE="complete_bash", COMP_WORDS="gradagree ablate sine-m", COMP_CWORD="2"
    )
    assert found.stdout.split() == ["sine-maml"]


def test_a_pipe_gets_no_colours() -> None:
    for arguments in ([], ["--help"], ["ablate", "--help"], ["ablate", "--list"]):
        found = run(*arguments, TERM="xterm-256color")
        assert not COLOUR.search(found.stdout + found.stderr)


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}], ids=["colours", "NO_COLOR"])
def test_a_terminal_gets_colours_unless_they_are_unwanted(variables: dict[str, str]) -> None:
    terminal, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gradagree_opt", "--help"],
        env={**environment, "TERM": "xterm-256color", **variables},
        stdout=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(terminal)
    assert process.wait() == 0
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


def test_the_module_is_the_command() -> None:
    assert run("--version").stdout == CliRunner().invoke(app, ["--version"]).stdout
