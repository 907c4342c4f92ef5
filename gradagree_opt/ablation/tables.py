"""The table of a study: Markdown and terminal for people, LaTeX for papers, CSV of all runs."""

import math
from typing import NamedTuple

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gradagree_opt.ablation.records import RunRecord
from gradagree_opt.ablation.statistics import Comparison, Interval, compare, interval
from gradagree_opt.ablation.sweep import Results


class Measure(NamedTuple):
    """How the test score of a kind of tasks is shown."""

    name: str
    column: str
    factor: float
    digits: str
    higher_is_better: bool


ACCURACY = Measure("accuracy in %", "accuracy", 100.0, ".1f", higher_is_better=True)
MEASURES = {
    "sine": Measure("mean squared error", "mse", 1.0, ".4f", higher_is_better=False),
    "grouped": Measure(
        "mean squared error in variances of the training data",
        "mse",
        1.0,
        ".4f",
        higher_is_better=False,
    ),
    "omniglot": ACCURACY,
    "mini-imagenet": ACCURACY,
    "learn2learn": ACCURACY,
}
EDGE = "†"
ADJUSTED_P = "p (Holm)"
EFFECT_SIZE = "effect size"


def all_runs(results: Results) -> pd.DataFrame:
    """Every run, tuning and final: one row for each number of gradient steps at the test."""
    methods = [method.name for method in results.study.methods]
    records = sorted(
        results.records.values(),
        key=lambda record: (
            methods.index(record.run.method.name),
            record.run.rate,
            record.run.seed,
        ),
    )
    score_column = MEASURES[results.study.tasks.kind].column
    table: pd.DataFrame = pd.DataFrame(
        {
            "method": record.run.method.name,
            "rate": record.run.rate,
            "seed": record.run.seed,
            "chosen": results.rates[record.run.method.name] == record.run.rate,
            "validation_loss": record.validation,
            "steps": steps,
            score_column: score,
        }
        for record in records
        for steps, score in record.test.items()
    )
    return table


def scores(records: list[RunRecord], steps: int) -> dict[int, float]:
    """The test scores after some gradient steps, by seed."""
    return {record.run.seed: record.test[steps] for record in records}


def steps_text(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def ranked(results: Results) -> list[str]:
    """The methods, the best first, those that diverged last."""
    higher_is_better = MEASURES[results.study.tasks.kind].higher_is_better

    def place(name: str) -> float:
        values = scores(results.final(name), results.study.tuning.steps)
        mean = interval(list(values.values())).mean
        return math.inf if math.isinf(mean) else -mean if higher_is_better else mean

    return sorted(results.rates, key=place)


def summary(results: Results) -> pd.DataFrame:
    """The table's cells as text, the best method first."""
    study = results.study
    measure, compared = MEASURES[study.tasks.kind], comparisons(results)

    def show(value: Interval, sign: str = "") -> str:
        return format(value.scaled(measure.factor), sign + measure.digits)

    rows = []
    for name in ranked(results):
        records = results.final(name)
        row = {"method": name, "outer rate": f"{results.rates[name]:g}"}
        row["outer rate"] += EDGE if results.at_edge(name) else ""
        for count in study.test.steps:
            row[steps_text(count)] = show(interval(list(scores(records, count).values())))
        comparison = compared.get(name)
        row[f"minus {study.baseline}"] = show(comparison.difference, "+") if comparison else ""
        row[ADJUSTED_P] = p_text(comparison.adjusted_p) if comparison else ""
        row[EFFECT_SIZE] = size_text(comparison.effect_size) if comparison else ""
        rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def comparisons(results: Results) -> dict[str, Comparison]:
    """Every method but the baseline compared with it, after the steps that rates are chosen by."""
    steps = results.study.tuning.steps
    by_method = {name: scores(results.final(name), steps) for name in results.rates}
    return compare(by_method, results.study.baseline)


def p_text(p: float) -> str:
    if math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def size_text(size: float) -> str:
    return "" if math.isnan(size) else f"{size:+.2f}"


def numbers(results: Results) -> pd.DataFrame:
    """The table's cells as numbers that are not rounded, scores as the runs have them."""
    study, compared = results.study, comparisons(results)
    nothing = Comparison(Interval(math.nan, math.nan), math.nan, math.nan, math.nan)
    rows = []
    for name in ranked(results):
        row = {"method": name, "rate": results.rates[name], "at_edge": results.at_edge(name)}
        for count in study.test.steps:
            mean, half_width = interval(list(scores(results.final(name), count).values()))
            row |= {f"mean_{count}_steps": mean, f"half_width_{count}_steps": half_width}
        difference, p, adjusted_p, size = compared.get(name, nothing)
        row |= {"difference": difference.mean, "difference_half_width": difference.half_width}
        row |= {"p": p, "p_holm": adjusted_p, "effect_size": size}
        rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def notes(results: Results) -> list[str]:
    """What a reader of the table must know."""
    study = results.study
    measure, test, tuning = MEASURES[study.tasks.kind], study.test, study.tuning
    per_class = "" if study.way is None else " of each class"
    rates = ", ".join(f"{rate:g}" for rate in study.outer.rates)
    shown = (
        f"{study.title}: {measure.name} on {test.tasks} unseen tasks after gradient steps on "
        f"{test.support_shots} examples{per_class}; mean and 95 % interval (Student t) over "
        f"{len(study.seeds)} seeds."
    )
    trained = (
        f"Outer rate chosen from {rates} by the loss after {tuning.steps} steps on {tuning.tasks} "
        f"validation tasks, {tuning.seeds} of the seeds; {study.iterations} iterations of "
        f"{study.meta_batch} tasks."
    )
    compared = f"Minus {study.baseline}: difference after {tuning.steps} steps, paired by seed."
    lines = [shown, trained, compared]
    if any(results.at_edge(name) for name in results.rates):
        lines.append(f"{EDGE} at the edge of the candidate rates: a better one may lie beyond it.")
    return lines


def comparison_notes(results: Results) -> list[str]:
    """What a reader of the p-values and effect sizes must know, where there are any."""
    compared = comparisons(results).values()
    tested = sum(not math.isnan(comparison.p) for comparison in compared)
    lines = []
    if tested:
        lines.append(
            f"{ADJUSTED_P}: two-sided t-test of that difference, paired by seed, adjusted for "
            f"{tested} comparisons."
        )
    if any(not math.isnan(comparison.effect_size) for comparison in compared):
        lines.append(
            "Effect size: Hedges' g_z, that difference in standard deviations of the seeds' "
            "differences, corrected for their small number."
        )
    return lines


def markdown(results: Results) -> str:
    table = summary(results)
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    all_notes = notes(results) + comparison_notes(results)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{note}  " for note in all_notes)]) + "\n"


def latex(results: Results) -> str:
    """A booktabs table; the notes are comments above it."""
    style = summary(results).style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis="columns")
    body: str = style.to_latex(hrules=True, column_format="ll" + "r" * (len(style.columns) - 2))
    body = body.replace("±", r"$\pm$").replace(EDGE, r"$^\dagger$").replace("< 0", "$<$ 0")
    all_notes = notes(results) + comparison_notes(results)
    return "".join(f"% {note}\n" for note in all_notes) + body


def terminal(results: Results) -> Table:
    """The table without tests: eight columns are what a terminal of eighty characters holds."""
    table = summary(results).drop(columns=[ADJUSTED_P, EFFECT_SIZE])
    shown = Table(
        caption="\n".join(notes(results)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for column in table.columns:
        shown.add_column(column, justify="left" if column == "method" else "right")
    for row in table.to_numpy().tolist():
        shown.add_row(*(cell.replace(" ± ", "\n± ") for cell in row))
    return shown
