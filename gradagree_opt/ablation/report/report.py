"""What a finished study comes to, computed once for all that show it."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from gradagree_opt.ablation.report import notes, tables
from gradagree_opt.ablation.runs.sweep import Part


@dataclass(frozen=True)
class Report:
    """The tables of a study, and what their readers must know.

    Attributes:
        parts: The study at each fraction of corrupted tasks.
        runs: Every run, tuning and final: one row for each number of gradient steps at the test.
        numbers: The table's cells as numbers that are not rounded.
        summary: The same as text, the best method of each part first.
        notes: The protocol, in sentences.
        comparison_notes: What the p-values and effect sizes are, where there are any.
    """

    parts: Sequence[Part]
    runs: pd.DataFrame
    numbers: pd.DataFrame
    summary: pd.DataFrame
    notes: list[str]
    comparison_notes: list[str]


def build_report(parts: Sequence[Part]) -> Report:
    """The report of the parts of a study."""
    compared = tables.comparisons(parts)
    return Report(
        parts=parts,
        runs=tables.all_runs(parts),
        numbers=tables.numbers(parts, compared),
        summary=tables.summary(parts, compared),
        notes=notes.notes(parts),
        comparison_notes=notes.comparison_notes(parts, compared),
    )
