"""The ``gradagree`` command run in this process, and what it left in a folder."""

from pathlib import Path

from typer.testing import CliRunner, Result

from gradagree_opt.cli import app

TIMED = {"table.csv", "report.html", "seconds.pdf", "seconds.png"}
"""The artefacts that tell how long runs took, so that two runs of one study do not share them."""


def gradagree(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), terminal_width=100)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
