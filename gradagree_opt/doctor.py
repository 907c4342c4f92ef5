"""``gradagree doctor``: tries every optional package in a process of its own, and names the fix.

``python -m gradagree_opt.doctor`` is the same where the ``gradagree`` command itself cannot start:
it needs nothing but Python.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, NamedTuple

from gradagree_opt.frameworks import FRAMEWORKS, Framework, require

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["works", "missing", "unsupported", "broken"]

COLOURS: dict[Status, str] = {
    "works": "green",
    "missing": "dim",
    "unsupported": "yellow",
    "broken": "red",
}

TIME_LIMIT = 300.0
"""Seconds for one package: the first import of a large one from a cold disk takes minutes."""


class Finding(NamedTuple):
    """What an examination of one package found.

    Attributes:
        framework: the package.
        version: as installed; None where it is missing.
        status: "works" means that it was imported and tried.
        reason: why it does not work; empty otherwise.
    """

    framework: Framework
    version: str | None
    status: Status
    reason: str = ""

    def fix(self) -> str:
        """The command that mends it; empty where it works."""
        if self.status == "works":
            return ""
        if self.status == "broken":
            return self.framework.mend_command(self.reason)
        return self.framework.install_command()


def examine(framework: Framework, /, *, time_limit: float = TIME_LIMIT) -> Finding:
    """Tries one package in a process of its own, which a broken one cannot take others down from.

    Args:
        framework: the package.
        time_limit: seconds after which it counts as broken.
    """
    version = framework.installed_version()
    if version is None:
        return Finding(framework, None, "missing")
    if not framework.supports(version):
        return Finding(framework, version, "unsupported", f"needs {framework.supported}")
    # The path of this process, so that what is tried is what it would import itself.
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; import {framework.module}; {framework.trial}"
    )
    try:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=time_limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(framework, version, "broken", f"no answer in {time_limit:g} s")
    if run.returncode == 0:
        return Finding(framework, version, "works")
    if run.returncode < 0:
        return Finding(framework, version, "broken", f"ended by signal {-run.returncode}")
    complaint = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
    return Finding(framework, version, "broken", complaint[-1])


def examine_all() -> list[Finding]:
    """Tries every package of :data:`gradagree_opt.frameworks.FRAMEWORKS`, several at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(examine, FRAMEWORKS.values()))


def healthy(findings: Sequence[Finding], /) -> bool:
    """Whether everything that is installed works."""
    return all(finding.status in ("works", "missing") for finding in findings)


def table(findings: Sequence[Finding], /) -> "Table":
    """One row for each package; the fixes are longer than a row, see :func:`fixes`."""
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, pad_edge=False)
    for heading in ("package", "version", "status", "needed by", "why"):
        rows.add_column(heading, overflow="fold")
    for finding in findings:
        name, version = finding.framework.distribution, finding.version or ""
        status = Text(finding.status, COLOURS[finding.status])
        rows.add_row(name, version, status, finding.framework.needed_by, Text(finding.reason))
    return rows


def fixes(findings: Sequence[Finding], /) -> list[str]:
    """One line for each package that does not work, with the command that mends it."""
    return [
        f"{finding.framework.distribution} is {finding.status}: {finding.fix()}"
        for finding in findings
        if finding.status != "works"
    ]


def main() -> int:
    """Prints the table, in plain lines where rich is not there to draw it, and under it the fixes.

    Returns:
        Exit status: 0 if everything that is installed works, 1 otherwise.
    """
    try:
        require("rich")
    except ImportError:
        findings = examine_all()
        for finding in findings:
            words = (finding.framework.distribution, finding.version, finding.status)
            sys.stdout.write(" ".join(filter(None, (*words, finding.reason))) + "\n")
    else:
        from rich.console import Console

        with Console(stderr=True).status("importing every package once"):
            findings = examine_all()
        Console(highlight=False).print(table(findings))
    for line in fixes(findings):
        sys.stdout.write(f"\n{line}\n")
    return 0 if healthy(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
