"""The table of a study, its cells as text and as numbers, and what its reader must know."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from gradagree_opt.ablation.records import RunRecord
from gradagree_opt.ablation.sections import GroupedTasks
from gradagree_opt.ablation.statistics import (
    Comparison,
    Interval,
    adjusted_together,
    compare,
    interval,
)
from gradagree_opt.ablation.study import Study
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
    "digits": ACCURACY,
    "omniglot": ACCURACY,
    "mini-imagenet": ACCURACY,
    "learn2learn": ACCURACY,
}
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


def fractions(parts: Sequence[Results]) -> list[float]:
    """The share of corrupted training tasks of each part."""
    return [part.study.fraction for part in parts]


def all_runs(parts: Sequence[Results]) -> pd.DataFrame:
    """Every run, tuning and final: one row for each number of gradient steps at the test."""
    return below_one_another(map(runs_of, parts), "fraction", fractions(parts))


def runs_of(results: Results) -> pd.DataFrame:
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


def counted(count: int, thing: str) -> str:
    return f"1 {thing}" if count == 1 else f"{count} {thing}s"


def after(study: Study, steps: int) -> str:
    """After how many steps a score or loss is taken; nothing where no task is adapted to."""
    return f" after {counted(steps, 'step')}" if study.adapts else ""


def ranked(results: Results) -> list[str]:
    """The methods, the best first, those that diverged last."""
    higher_is_better = MEASURES[results.study.tasks.kind].higher_is_better

    def place(name: str) -> float:
        values = scores(results.final(name), results.study.tuning.steps)
        mean = interval(list(values.values())).mean
        return math.inf if not math.isfinite(mean) else -mean if higher_is_better else mean

    return sorted(results.rates, key=place)


def summary(parts: Sequence[Results]) -> pd.DataFrame:
    """The table's cells as text, the best method of each part first."""
    labels = [f"{100 * fraction:g} %" for fraction in fractions(parts)]
    return below_one_another(map(summary_of, parts, comparisons(parts)), CORRUPTED, labels)


def summary_of(results: Results, compared: Mapping[str, Comparison]) -> pd.DataFrame:
    study = results.study
    measure = MEASURES[study.tasks.kind]

    def show(value: Interval, sign: str = "") -> str:
        return format(value.scaled(measure.factor), sign + measure.digits)

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
        row[f"minus {study.baseline}"] = show(comparison.difference, "+") if comparison else ""
        row[ADJUSTED_P] = p_text(comparison.adjusted_p) if comparison else ""
        row[EFFECT_SIZE] = size_text(comparison.effect_size) if comparison else ""
        rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def comparisons(parts: Sequence[Results]) -> list[dict[str, Comparison]]:
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


def numbers(parts: Sequence[Results]) -> pd.DataFrame:
    """The table's cells as numbers that are not rounded, scores as the runs have them."""
    tables = map(numbers_of, parts, comparisons(parts))
    return below_one_another(tables, "fraction", fractions(parts))


def numbers_of(results: Results, compared: Mapping[str, Comparison]) -> pd.DataFrame:
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
        rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def rates_text(study: Study) -> str:
    """The candidates for the outer rate: of all methods, then of those that have their own."""

    def listed(rates: list[float]) -> str:
        return ", ".join(f"{rate:g}" for rate in rates)

    own = [f'"{method.name}": {listed(method.rates)}' for method in study.methods if method.rates]
    text = listed(study.outer.rates) if len(own) < len(study.methods) else "its own"
    text += f" ({'; '.join(own)})" if own else ""
    if study.outer.extend:
        more = counted(study.outer.extend, "rate")
        text += f", extended by up to {more} where the best was at an edge,"
    return text


def other_optimizers(study: Study) -> str:
    """The methods whose outer optimizer is not the study's, each with its own."""
    found = {method.name: study.optimizer(method) for method in study.methods}
    others = {name: own for name, own in found.items() if own != study.outer.optimizer}
    return ", ".join(f'{own} for "{name}"' for name, own in others.items())


def tuning_seeds_text(study: Study) -> str:
    """How many seeds the rates are chosen on, and whose they are."""
    count = len(study.tuning_seeds)
    own = isinstance(study.tuning.seeds, list)
    return f"{counted(count, 'seed')} of their own" if own else f"{count} of the seeds"


def notes(parts: Sequence[Results]) -> list[str]:
    """What a reader of the table must know."""
    study = parts[-1].study
    measure, test, tuning = MEASURES[study.tasks.kind], study.test, study.tuning
    spread = (
        f"mean and 95 % interval (Student t) over {len(study.seeds)} seeds"
        if len(study.seeds) > 1
        else "one seed"
    )
    if study.adapts:
        per_class = "" if study.way is None else " of each class"
        examples = f"{counted(test.support_shots, 'example')}{per_class}"
        unseen = f"{test.tasks} {unseen_tasks(study)}"
        tested = f"{measure.name} on {unseen} after gradient steps on {examples}"
        validation = counted(tuning.tasks, "validation task")
    else:
        tested = f"mean {measure.name} of {test.tasks} tasks on {test.query_shots} unseen inputs"
        validation = f"{test.query_shots} validation inputs"
    chosen = (
        f"Outer rate chosen from {rates_text(study)} by the loss{after(study, tuning.steps)} on "
        f"{validation}, {tuning_seeds_text(study)}"
        if len(study.outer.rates) > 1
        else "Outer rate not tuned"
    )
    trained = f"{chosen}; {study.iterations} iterations of {counted(study.meta_batch, 'task')}."
    if others := other_optimizers(study):
        trained += f" Outer optimizer {study.outer.optimizer}; {others}."
    compared = f"Minus {study.baseline}: difference{after(study, tuning.steps)}, paired by seed."
    lines = [f"{study.title}: {tested}; {spread}.", trained, compared]
    if len(parts) > 1 and study.corruption:
        kind = study.corruption.kind.replace("_", " ")
        lines.append(
            f"Corrupted: share of the training tasks that are spoilt ({kind}), validation and test "
            "tasks are clean; rates are chosen and differences taken at each share by itself."
        )
    if getattr(study.tasks, "folds", None) and len(study.outer.rates) > 1:
        lines.append(
            "Folds: no group that a seed tests on is in its training; but groups that validate at "
            "one seed, which the rate is chosen by, test at another."
        )
    if any(part.at_edge(name) for part in parts for name in part.rates):
        lines.append(f"{EDGE} at the edge of the candidate rates: a better one may lie beyond it.")
    return lines


def unseen_tasks(study: Study) -> str:
    """What a test task of the study is; of groups there are few, and they come again."""
    if not isinstance(study.tasks, GroupedTasks):
        return "unseen tasks"
    if study.tasks.folds is None:
        return "tasks drawn from unseen groups"
    return f"tasks drawn from unseen groups (one of {study.tasks.folds} folds at each seed)"


def comparison_notes(parts: Sequence[Results]) -> list[str]:
    """What a reader of the p-values and effect sizes must know, where there are any."""
    compared = [found for part in comparisons(parts) for found in part.values()]
    tested = sum(not math.isnan(comparison.p) for comparison in compared)
    lines = []
    if tested:
        together = ", those at all shares together" if len(parts) > 1 else ""
        lines.append(
            f"{ADJUSTED_P}: two-sided t-test of that difference, paired by seed, adjusted for "
            f"{counted(tested, 'comparison')}{together}."
        )
    if any(not math.isnan(comparison.effect_size) for comparison in compared):
        lines.append(
            "Effect size: Hedges' g_z, that difference in standard deviations of the seeds' "
            "differences, corrected for their small number."
        )
    return lines
