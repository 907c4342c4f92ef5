"""What is shown while a study runs: how far it is, on a terminal also the best of each method."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gradagree_opt.ablation.output import Errors
from gradagree_opt.ablation.report.significance import interval
from gradagree_opt.ablation.runs.sweep import count_runs
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import RunRecord

errors = Console(file=cast(TextIO, Errors()), soft_wrap=True, highlight=False)
"""Standard error: all that is said beside the result."""

LOGGED = 5
"""Per cent of a study after which a file or a pipe gets another line."""


class Display:
    """A bar with the time left: on a terminal one that moves, with a line for each method below it.

    In a file or a pipe it is printed again at every twentieth of the study.

    Args:
        total: The outer steps of all parts of the study.
    """

    def __init__(self, title: str, total: int, console: Console) -> None:
        self.title, self.console = title, console
        self.progress = Progress(
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("so far,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            speed_estimate_period=120,
        )
        self.bar = self.progress.add_task("", total=total)
        self.study: Study | None = None
        self.ended: dict[str, list[RunRecord]] = {}

    @contextmanager
    def live(self) -> Iterator[None]:
        """Shows it while the context lasts."""
        if not self.console.is_terminal:
            self.console.print(Text(self.title))
            yield
            return
        with Live(self, console=self.console):
            yield

    def advance(self, steps: int) -> None:
        """Counts outer steps that were done."""
        before = self.percentage
        self.progress.advance(self.bar, steps)
        if not self.console.is_terminal and self.percentage // LOGGED > before // LOGGED:
            self.console.print(self.progress)

    def resize(self, total: int) -> None:
        """Takes another number of outer steps: of a study that tries rates beyond an edge."""
        self.progress.update(self.bar, total=total)

    def end(self, part: Study, record: RunRecord, *, found: bool) -> None:
        """Counts a run of a part of the study; only those of the latest part are shown.

        Args:
            found: Whether it was finished before: its steps say nothing about the speed.
        """
        if part is not self.study:
            self.study, self.ended = part, {method.name: [] for method in part.methods}
        self.ended[record.run.method.name].append(record)
        if found:
            [bar] = self.progress.tasks
            started = bar.start_time
            self.progress.reset(self.bar, completed=int(bar.completed) + part.iterations)
            bar.start_time = started

    @property
    def percentage(self) -> float:
        return self.progress.tasks[self.bar].percentage

    def __rich__(self) -> Group:
        shown = best(self.study, self.ended) if self.study else Text()
        return Group(Text(self.title), self.progress, shown)


def best(study: Study, ended: dict[str, list[RunRecord]]) -> Table:
    """The lowest validation loss of each method so far, and the outer rate of that run."""
    corrupted = f", {100 * study.fraction:g} % corrupted" if study.corruption else ""
    found = {record.run.label: record for records in ended.values() for record in records}
    table = Table(box=None, pad_edge=False)
    table.add_column(f"method{corrupted}", no_wrap=True, max_width=32)
    for heading in ("lowest validation loss", "outer rate", "runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method in study.methods:
        records = ended[method.name]
        lowest = min(records, key=lambda record: record.validation, default=None)
        loss = rate = ""
        if lowest is not None:
            loss, rate = f"{interval([lowest.validation]):.4g}", f"{lowest.run.rate:g}"
        count = f"{len(records)} of {count_runs(study, method, found)}"
        table.add_row(Text(method.name), loss, rate, count)
    return table
