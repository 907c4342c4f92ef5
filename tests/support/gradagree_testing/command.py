"""The ``gradagree`` command run in this process, and what it left in a folder."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradagree_opt.cli import app

TIMED = {"table.csv", "report.html", "seconds.pdf", "seconds.png"}
"""The artefacts that tell how long runs took, so that two runs of one study do not share them."""


def gradagree(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), terminal_width=100)


def leave_pictures_empty(patch: pytest.MonkeyPatch) -> None:
    """Draws figures on a study's page alone: their files take most of a tiny study's time."""
    from gradagree_opt.ablation.report import page, style

    assert page.save is style.save  # its own name for it, which stays as it is
    patch.setattr(style, "save", lambda *_: b"")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
