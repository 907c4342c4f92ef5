"""What the reader of a study's table must know: its protocol, its rates, its tests."""

import math
from collections.abc import Sequence

from gradagree_opt.ablation.report.tables import (
    ADJUSTED_P,
    EDGE,
    Comparisons,
    after,
    counted,
)
from gradagree_opt.ablation.runs.sweep import Part
from gradagree_opt.ablation.study.study import Study


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


def diverged_text(parts: Sequence[Part]) -> str:
    """From how many of its seeds each method diverged, where it did; of several parts, in which."""
    found = []
    for part in parts:
        share = f" at {100 * part.study.fraction:g} %" if len(parts) > 1 else ""
        for name in part.rates:
            lost = sum(math.inf in record.test.values() for record in part.final(name))
            if lost:
                found.append(f'"{name}" from {lost} of {len(part.study.seeds)} seeds{share}')
    return ", ".join(found)


def notes(parts: Sequence[Part]) -> list[str]:
    """What a reader of the table must know."""
    study = parts[-1].study
    measure, test, tuning = study.tasks.measure, study.test, study.tuning
    spread = (
        f"mean and 95 % interval (Student t) over {len(study.seeds)} seeds"
        if len(study.seeds) > 1
        else "one seed"
    )
    if study.adapts:
        per_class = "" if study.way is None else " of each class"
        examples = f"{counted(test.support_shots, 'example')}{per_class}"
        unseen = f"{test.tasks} {study.tasks.unseen}"
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
    iterations = counted(study.iterations, "iteration")
    trained = f"{chosen}; {iterations} of {counted(study.meta_batch, 'task')}."
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
    if diverged := diverged_text(parts):
        lines.append(f"Diverged: {diverged}.")
    if any(part.at_edge(name) for part in parts for name in part.rates):
        lines.append(f"{EDGE} at the edge of the candidate rates: a better one may lie beyond it.")
    return lines


def comparison_notes(parts: Sequence[Part], comparisons: Comparisons) -> list[str]:
    """What a reader of the p-values and effect sizes must know, where there are any."""
    compared = [found for part in comparisons for found in part.values()]
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
