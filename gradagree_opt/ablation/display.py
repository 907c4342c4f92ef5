"""What a terminal shows while a study runs: how far it is, and the best of each method so far."""

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

from gradagree_opt.ablation.records import RunRecord
from gradagree_opt.ablation.statistics import interval
from gradagree_opt.ablation.study import Study
from gradagree_opt.ablation.sweep import number_of_runs


class Display:
    """A bar with the time left and, on a terminal, a line for each method below it.

    Args:
        total: The outer steps of all parts of the study.
    """

    def __init__(self, title: str, total: int, console: Console) -> None:
        self.title, self.console = title, console
        self.progress = Progress(
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            speed_estimate_period=120,
        )
        self.bar = self.progress.add_task("", total=total)
        self.study: Study | None = None
        self.ended: dict[str, list[RunRecord]] = {}

    def live(self) -> Live:
        """Shows it while the context lasts."""
        return Live(self, console=self.console)

    def advance(self, steps: int) -> None:
        self.progress.advance(self.bar, steps)

    def end(self, part: Study, record: RunRecord) -> None:
        """Counts a run of a part of the study; only those of the latest part are shown."""
        if part is not self.study:
            self.study, self.ended = part, {method.name: [] for method in part.methods}
        self.ended[record.run.method.name].append(record)

    def __rich__(self) -> Group:
        # Text(), since on a pipe the next message goes on where the last line of this ends.
        shown = best(self.study, self.ended) if self.study and self.console.is_terminal else Text()
        return Group(Text(self.title), self.progress, shown)


def best(study: Study, ended: dict[str, list[RunRecord]]) -> Table:
    """The lowest validation loss of each method so far, and the outer rate of that run."""
    corrupted = f", {100 * study.fraction:g} % corrupted" if study.corruption else ""
    each = number_of_runs(study) // len(ended)
    table = Table(box=None, pad_edge=False)
    table.add_column(f"method{corrupted}", no_wrap=True, max_width=32)
    for heading in ("lowest validation loss", "outer rate", "runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, records in ended.items():
        lowest = min(records, key=lambda record: record.validation, default=None)
        loss = rate = ""
        if lowest is not None:
            loss, rate = f"{interval([lowest.validation]):.4g}", f"{lowest.run.rate:g}"
        table.add_row(Text(name), loss, rate, f"{len(records)} of {each}")
    return table
