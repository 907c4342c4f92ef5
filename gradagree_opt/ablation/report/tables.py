"""The table of a study, its cells as text and as numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TypeAlias

import pandas as pd

from gradagree_opt.ablation.report.significance import (
    Comparison,
    Interval,
    adjusted_together,
    compare,
    interval,
)
from gradagree_opt.ablation.runs.sweep import Part
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import RunRecord

Comparisons: TypeAlias = list[dict[str, Comparison]]
"""Of each part, every method but the baseline with it."""
EDGE = "†"
ADJUSTED_P = "p (Holm)"
EFFECT_SIZE = "effect size"
CORRUPTED = "corrupted"


def below_one_another(
    tables: Iterable[pd.DataFrame], column: str, labels: Sequence[float | str]
) -> pd.DataFrame:
    """One table of those of the parts; where there are several, their labels come first."""
    blocks = list(tables)
    if len(blocks) > 1:
        for block, label in zip(blocks, labels, strict=True):
            block.insert(0, column, label)
    return pd.concat(blocks, ignore_index=True)


def fractions(parts: Sequence[Part]) -> list[float]:
    """The share of corrupted training tasks of each part."""
    return [part.study.fraction for part in parts]


def all_runs(parts: Sequence[Part]) -> pd.DataFrame:
    """Every run, tuning and final: one row for each number of gradient steps at the test."""
    return below_one_another(map(runs_of, parts), "fraction", fractions(parts))


def runs_of(results: Part) -> pd.DataFrame:
    methods = [method.name for method in results.study.methods]
    records = sorted(
        results.records.values(),
        key=lambda record: (
            methods.index(record.run.method.name),
            record.run.rate,
            record.run.seed,
        ),
    )
    score_column = results.study.tasks.measure.column
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


def counted(count: int, thing: str, things: str | None = None) -> str:
    return f"1 {thing}" if count == 1 else f"{count} {things or thing + 's'}"


def after(study: Study, steps: int) -> str:
    """After how many steps a score or loss is taken; nothing where no task is adapted to."""
    return f" after {counted(steps, 'step')}" if study.adapts else ""


def ranked(results: Part) -> list[str]:
    """The methods, the best first, those that diverged last."""
    higher_is_better = results.study.tasks.measure.higher_is_better

    def place(name: str) -> float:
        values = scores(results.final(name), results.study.tuning.steps)
        mean = interval(list(values.values())).mean
        return math.inf if not math.isfinite(mean) else -mean if higher_is_better else mean

    return sorted(results.rates, key=place)


def summary(parts: Sequence[Part], compared: Comparisons) -> pd.DataFrame:
    """The table's cells as text, the best method of each part first."""
    labels = [f"{100 * fraction:g} %" for fraction in fractions(parts)]
    return below_one_another(map(summary_of, parts, compared), CORRUPTED, labels)


def summary_of(results: Part, compared: Mapping[str, Comparison]) -> pd.DataFrame:
    study = results.study
    measure = study.tasks.measure

    def show(value: Interval, sign: str = "") -> str:
        return format(value.scaled(measure.factor), sign + measure.digits)

    def minus(comparison: Comparison) -> str:
        if comparison.difference.mean == -math.inf:  # the method has not diverged
            return f"{study.baseline} diverged"
        return show(comparison.difference, "+")

    rows = []
    for name in ranked(results):
        records = results.final(name)
        row = {"method": name, "outer rate": f"{results.rates[name]:g}"}
        row["outer rate"] += EDGE if results.at_edge(name) else ""
        for count in study.test.steps:
            row[counted(count, "step") if study.adapts else "test"] = show(
                interval(list(scores(records, count).values()))
            )
        comparison = compared.get(name)
        row[f"minus {study.baseline}"] = minus(comparison) if comparison else ""
        row[ADJUSTED_P] = p_text(comparison.adjusted_p) if comparison else ""
        row[EFFECT_SIZE] = size_text(comparison.effect_size) if comparison else ""
        rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def comparisons(parts: Sequence[Part]) -> Comparisons:
    """In each part every method but the baseline compared with it.

    After the steps that rates are chosen by; p-values are adjusted over all parts.
    """
    return adjusted_together(
        [
            compare(
                {name: scores(part.final(name), part.study.tuning.steps) for name in part.rates},
                part.study.baseline,
            )
            for part in parts
        ]
    )


def p_text(p: float) -> str:
    if math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def size_text(size: float) -> str:
    return "" if math.isnan(size) else f"{size:+.2f}"


def numbers(parts: Sequence[Part], compared: Comparisons) -> pd.DataFrame:
    """The table's cells as numbers that are not rounded, scores as the runs have them."""
    tables = map(numbers_of, parts, compared)
    return below_one_another(tables, "fraction", fractions(parts))


def numbers_of(results: Part, compared: Mapping[str, Comparison]) -> pd.DataFrame:
    study = results.study
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
        row["median_seconds"] = median(record.seconds for record in results.final(name))
        rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table
