"""The published tables, computed anew from the records by scipy, without the library."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

RESULTS = Path(__file__).parents[3] / "docs/results"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def with_one_share(folder: Path) -> bool:
    """Whether its records are of one study: they do not say of which share of spoilt tasks."""
    corruption = read(folder / "config.json")["study"]["corruption"]
    return corruption is None or not isinstance(corruption["fraction"], list)


STUDIES = sorted(
    path.parent for path in RESULTS.glob("*/config.json") if with_one_share(path.parent)
)
Records = dict[tuple[str, float], dict[int, Any]]


def labelled(method: Any) -> str:
    """What a method is: studies share records, where it may have another name."""
    return json.dumps([method.get(key) for key in ("aggregator", "options", "outer")])


def records_of(folder: Path) -> Records:
    """By method and rate, then by seed."""
    found: Records = defaultdict(dict)
    for record in map(read, folder.glob("runs/*.json")):
        run = record["run"]
        found[labelled(run["method"]), run["rate"]][run["seed"]] = record
    return found


def closed(p_values: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Holm's adjustment by its definition: the largest of Bonferroni's in all subsets."""
    names = [*p_values]
    subsets = [each for n in range(1, len(names) + 1) for each in combinations(names, n)]
    for name in names:
        yield (
            name,
            max(
                min(1.0, len(each) * min(p_values[other] for other in each))
                for each in subsets
                if name in each
            ),
        )


def numbers(row: dict[str, str], *names: str) -> list[float]:
    return [float(row[name] or "nan") for name in names]


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_rates_intervals_and_tests_are_those_of_the_records(folder: Path) -> None:
    study, records = read(folder / "config.json")["study"], records_of(folder)
    with (folder / "table.csv").open(encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    seeds, tuning = study["seeds"], study["tuning"]
    tuned_on = tuning["seeds"] if isinstance(tuning["seeds"], list) else seeds[: tuning["seeds"]]
    steps = str(tuning["steps"])
    scores: dict[str, np.ndarray] = {}
    for method in study["methods"]:
        name, label = method["name"], labelled(method)
        row = rows[name]
        losses = {
            rate: np.mean([float(runs[seed]["validation"]) for seed in tuned_on])
            for (other, rate), runs in records.items()
            if other == label and runs.keys() >= set(tuned_on)
        }
        rate = min(sorted(losses), key=lambda rate: losses[rate])
        assert float(row["rate"]) == rate
        assert row["at_edge"] == str(len(losses) > 1 and rate in (min(losses), max(losses)))
        runs = [records[label, rate][seed] for seed in seeds]
        assert numbers(row, "median_seconds") == [np.median([run["seconds"] for run in runs])]
        for count in map(str, study["test"]["steps"]):
            values = np.array([float(run["test"][count]) for run in runs])
            mean, half = numbers(row, f"mean_{count}_steps", f"half_width_{count}_steps")
            if np.isfinite(values).all():
                found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
                assert (mean - half, mean + half) == pytest.approx(found, rel=1e-9, abs=1e-12)
            else:
                assert mean == np.inf and np.isnan(half)
            if count == steps:
                scores[name] = values
    baseline = scores.pop(study["baseline"])
    p_values = {}
    for name, values in scores.items():
        mean, half, p = numbers(rows[name], "difference", "difference_half_width", "p")
        if np.isfinite(values - baseline).all():
            test = stats.ttest_rel(values, baseline)
            interval = test.confidence_interval(0.95)
            assert (mean - half, mean + half) == pytest.approx(interval, rel=1e-8, abs=1e-12)
            assert p == pytest.approx(test.pvalue, rel=1e-8)
            p_values[name] = test.pvalue
        else:
            assert np.isnan(p)
    for name, adjusted in closed(p_values):
        assert numbers(rows[name], "p_holm") == pytest.approx([adjusted], rel=1e-8)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_what_is_paired_has_begun_alike(folder: Path) -> None:
    """Before training, the runs of a seed have one validation loss, whatever method and rate."""
    losses = defaultdict(set)
    for runs in records_of(folder).values():
        for seed, record in runs.items():
            losses[seed].add(record["curve"][0]["loss"])
    assert len(losses) >= 5 and {len(each) for each in losses.values()} == {1}


EQUAL, LENGTH = "equal agreement", "mean at equal agreement's length"
ON_SINES = [
    f"equal-sine-torchjd{setting}"
    for setting in ("", "-corrupted", "-foreign", "-noise", "-scale", "-flipped")
]
TORCHJD = ("UPGrad", "PCGrad", "CAGrad", "Aligned-MTL")
SAID = [  # of pairs without the mean, which no table has: on docs/results.md
    ("equal-sine", EQUAL, LENGTH, 0, 0.001),
    ("equal-sine-maml", "equal agreement with SGD", "mean with SGD", 0, 0.001),
    ("multi-task-digits", "equal agreement with momentum", "mean with momentum", 0, 0.001),
    ("equal-sine-torchjd", "UPGrad", LENGTH, 0, 0.01),
    ("equal-sine-torchjd", "PCGrad", LENGTH, 0, 0.01),
    *((study, EQUAL, other, 0, 0.01) for study, other in product(ON_SINES, TORCHJD)),
    ("equal-sine-torchjd", EQUAL, "MGDA", 0, 0.01),
    ("equal-sine-torchjd", EQUAL, "k = -1", 0.05, 1),
    ("equal-sine-torchjd", EQUAL, "k = -0.5", 0, 0.01),
    ("equal-sine-torchjd", EQUAL, "mean with Adam", 0, 0.01),
    ("equal-sine-torchjd-maml", EQUAL, "UPGrad", 0.05, 1),
    ("equal-sine-torchjd-maml", EQUAL, "PCGrad", 0.05, 1),
    ("equal-sine-torchjd-maml", EQUAL, "Aligned-MTL", 0.05, 1),
    ("damping", "λ = 0.1", "λ = 0.01", 0.05, 1),
    ("gramian-powers", "k = -0.5", "k = -1", 0.05, 1),
]


@pytest.mark.parametrize(("study", "one", "other", "least", "most"), SAID)
def test_what_is_said_of_two_methods_is_that_of_their_paired_runs(
    study: str, one: str, other: str, least: float, most: float
) -> None:
    runs = scores(study)
    assert least < stats.ttest_rel(runs[one], runs[other]).pvalue < most


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def scores(study: str, share: str = "", steps: int | None = None) -> dict[str, list[float]]:
    """Of each method at its chosen rate, in the order of the seeds."""
    config = read(RESULTS / study / "config.json")["study"]
    wanted = str(config["tuning"]["steps"] if steps is None else steps)
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows_of(RESULTS / study / "results.csv"):
        if (row["chosen"], row["steps"], row.get("fraction", "")) == ("True", wanted, share):
            found[row["method"]][int(row["seed"])] = float([*row.values()][-1])
    return {name: [each[seed] for seed in config["seeds"]] for name, each in found.items()}


RATIOS = [  # of mean scores: study, share of spoilt tasks, methods, steps, what is said of them
    ("equal-sine", "", EQUAL, "mean", 5, "0.56"),
    ("equal-sine", "", EQUAL, LENGTH, 5, "0.71"),
    ("equal-sine", "", EQUAL, "mean", 32, "0.43"),  # less than half
    ("equal-sine-controls", "", "equal agreement at the mean's length", "mean", 5, "0.45"),
    ("equal-sine-controls", "", "mean of the directions", "mean", 5, "1.11"),
    ("equal-sine-corrupted", "0.0", EQUAL, "mean", 5, "0.3"),
    ("equal-sine-corrupted", "0.1", EQUAL, "mean", 5, "0.3"),
    ("equal-sine-corrupted", "0.3", EQUAL, "mean", 5, "0.2"),
    ("equal-sine-corrupted", "0.5", EQUAL, "mean", 5, "0.2"),
    ("equal-sine-corrupted", "0.1", "mean with momentum", EQUAL, 5, "2.3"),
    ("equal-sine-corrupted", "0.0", "mean with momentum", EQUAL, 5, "3.5"),
    ("equal-sine-scale", "", EQUAL, "mean", 5, "0.1"),
    ("equal-sine-foreign", "", EQUAL, "mean", 5, "0.1"),
    ("equal-sine-flipped", "", EQUAL, "mean", 5, "0.2"),
    ("equal-sine-noise", "", EQUAL, "mean", 5, "0.4"),
    ("equal-sine-noise", "", LENGTH, EQUAL, 5, "1.9"),
    ("equal-sine-foreign", "", LENGTH, EQUAL, 5, "6.8"),
    ("equal-sine-scale", "", "norm clipped", EQUAL, 5, "2.6"),
    ("equal-sine-noise", "", "mean with momentum", "mean", 5, "0.7"),
    ("equal-sine-foreign", "", "mean with momentum", "mean", 5, "0.8"),
    ("tasks-per-batch-5", "", EQUAL, "mean", 5, "0.37"),
    ("tasks-per-batch-25", "", EQUAL, "mean", 5, "0.17"),
    ("tasks-per-batch-50", "", EQUAL, "mean", 5, "0.15"),
    ("equal-sine-torchjd-corrupted", "", EQUAL, "UPGrad", 5, "0.36"),
    ("equal-sine-torchjd-foreign", "", EQUAL, "UPGrad", 5, "0.33"),
    ("equal-sine-torchjd-noise", "", EQUAL, "UPGrad", 5, "0.62"),
    ("equal-sine-torchjd-scale", "", EQUAL, "CAGrad", 5, "0.28"),
    ("equal-sine-torchjd-flipped", "", EQUAL, "UPGrad", 5, "0.39"),
    ("gramian-powers", "", "k = 1", "mean", 5, "2.8"),
    ("gramian-powers", "", "k = -1", "mean", 5, "0.28"),
    ("equal-sine-maml", "", "equal agreement with SGD", "mean with SGD", 5, "0.5"),
    ("equal-sine-maml", "", "agreement", "mean", 5, "2.2"),  # twice
    ("damping", "", "λ = 0.0001", "λ = 0.01", 5, "1.5"),
    ("damping", "", "λ = 0.001", "λ = 0.01", 5, "1.5"),
    ("damping", "", "λ = 1", "λ = 0.01", 5, "2.7"),
    ("damping", "", "λ = 1", "mean", 5, "0.77"),
    ("sine-corrupted", "0.0", "agreement", "mean", 5, "2.8"),
    ("sine-corrupted", "0.5", "agreement", "mean", 5, "1.6"),
]


@pytest.mark.parametrize(("study", "share", "one", "other", "steps", "said"), RATIOS)
def test_what_is_said_of_ratios_is_that_of_the_runs(
    study: str, share: str, one: str, other: str, steps: int, said: str
) -> None:
    runs = scores(study, share, steps)
    digits = len(said.partition(".")[2])
    assert f"{np.mean(runs[one]) / np.mean(runs[other]):.{digits}f}" == said


P_VALUES = [  # of the difference to the mean: by itself, after Holm
    ("equal-sine-adam", EQUAL, "0.02", "0.06"),
    ("equal-sine-adam", "agreement", "0.04", "0.07"),
    ("equal-omniglot-5way-1shot", EQUAL, "0.08", "0.17"),
    ("equal-sine-torchjd-scale", EQUAL, "0.010", "0.062"),
    ("equal-sine-torchjd-maml", "CAGrad", "0.005", "0.023"),
    *(
        ("equal-sine-torchjd-maml", name, "", "0.061")
        for name in (EQUAL, *TORCHJD)
        if name != "CAGrad"
    ),
    ("equal-sine-maml", EQUAL, "0.19", "0.57"),
    ("equal-sine-maml", "equal agreement with SGD", "0.35", "0.70"),
    ("equal-grouped-oxboys", EQUAL, "0.023", "0.023"),
    ("multi-task-digits-torchjd", EQUAL, "0.012", "0.069"),
    ("multi-task-digits-torchjd", "Aligned-MTL", "0.011", "0.069"),
]


@pytest.mark.parametrize(("study", "method", "alone", "adjusted"), P_VALUES)
def test_what_is_said_of_p_values_is_that_of_the_table(
    study: str, method: str, alone: str, adjusted: str
) -> None:
    [row] = [each for each in rows_of(RESULTS / study / "table.csv") if each["method"] == method]
    for said, there in ((alone, row["p"]), (adjusted, row["p_holm"])):
        assert not said or f"{float(there):.{len(said) - 2}f}" == said


LEAST = [  # every adjusted p-value is that or more
    ("grouped", 0.58),
    ("omniglot-5way-1shot", 0.28),
    ("omniglot-5way-5shot", 0.28),
    ("omniglot-20way-1shot", 0.28),
]


@pytest.mark.parametrize(("study", "least"), LEAST)
def test_no_method_has_an_adjusted_p_value_below_what_is_said(study: str, least: float) -> None:
    found = [
        float(row["p_holm"]) for row in rows_of(RESULTS / study / "table.csv") if row["p_holm"]
    ]
    assert min(found) >= least


@pytest.mark.parametrize(
    ("study", "runs"),
    [
        ("equal-sine", 108 + 40),
        ("equal-sine-corrupted", 491),
        ("sine", 81),
        ("sine-corrupted", 224),
        ("omniglot-5way-1shot", 42),
        ("omniglot-5way-5shot", 42),
        ("omniglot-20way-1shot", 21),
        ("grouped", 99),
    ],
)
def test_the_number_of_runs_is_that_of_the_records(study: str, runs: int) -> None:
    assert len([*(RESULTS / study).glob("runs/*.json")]) == runs


def diagnostics(study: str, name: str, key: str) -> list[float]:
    """Of the batches on record of a method's runs at its chosen rate, from the study's seeds."""
    folder = RESULTS / study
    [row] = [each for each in rows_of(folder / "table.csv") if each["method"] == name]
    config = read(folder / "config.json")["study"]
    [method] = [each for each in config["methods"] if each["name"] == name]
    runs = records_of(folder)[labelled(method), float(row["rate"])]
    points = [point for seed in config["seeds"] for point in runs[seed]["curve"]]
    return [point["diagnostics"][key] for point in points if point["diagnostics"]]


@pytest.mark.parametrize(
    ("study", "method", "said"),
    [
        ("equal-sine", EQUAL, "8.4"),
        ("sine", "agreement", "3.4"),
        ("omniglot-5way-1shot", "agreement", "1.06"),
        ("omniglot-5way-5shot", "agreement", "1.06"),
        ("omniglot-20way-1shot", "agreement", "1.01"),
    ],
)
def test_what_is_said_of_the_length_of_steps_is_that_of_the_batches_on_record(
    study: str, method: str, said: str
) -> None:
    digits = len(said.partition(".")[2])
    assert f"{np.mean(diagnostics(study, method, 'update_to_mean')):.{digits}f}" == said


@pytest.mark.parametrize("task", ["5way-1shot", "5way-5shot", "20way-1shot"])
def test_on_omniglot_no_weight_of_agreement_is_negative(task: str) -> None:
    assert max(diagnostics(f"omniglot-{task}", "agreement", "negative_share")) == 0
