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
    config = read(RESULTS / study / "config.json")["study"]
    runs: dict[str, dict[int, float]] = defaultdict(dict)
    with (RESULTS / study / "results.csv").open(encoding="utf-8") as file:
        for method, _, seed, chosen, _, steps, score in csv.reader(file):
            if chosen == "True" and steps == str(config["tuning"]["steps"]):
                runs[method][int(seed)] = float(score)
    pairs = [(runs[one][seed], runs[other][seed]) for seed in config["seeds"]]
    assert least < stats.ttest_rel(*zip(*pairs, strict=True)).pvalue < most
