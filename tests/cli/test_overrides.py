"""Before anything runs: the version, --dry-run, and what --seeds and --iterations change."""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gradagree_opt.ablation import ablate
from gradagree_opt.ablation.runs import sweep
from gradagree_opt.ablation.runs.sweep import tuning_runs
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.training import trial
from gradagree_opt.ablation.training.run import Run
from gradagree_testing.command import contents, gradagree

from .conftest import TINY
from .conftest import ablate as run


def test_the_version_is_that_of_the_distribution() -> None:
    result = gradagree("--version")
    assert result.exit_code == 0
    assert result.stdout.split() == ["gradagree-opt", importlib.metadata.version("gradagree-opt")]


def keys(path: Path, **changes: object) -> list[str]:
    study = load(str(path), **changes)  # type: ignore[arg-type]
    return [run.key(study, None) for run in tuning_runs(study)]


def test_seeds_and_iterations_are_those_of_a_file_that_says_so(tiny: Path, tmp_path: Path) -> None:
    said = tmp_path / "said.yaml"
    said.write_text(
        TINY.replace("[3, 5, 6]", "[4, 5]").replace("iterations: 5", "iterations: 4", 1)
    )
    assert load(str(tiny), seeds=[4, 5], iterations=4) == load(str(said))
    assert keys(tiny, seeds=[4, 5], iterations=4) == keys(said)
    assert set(keys(tiny, iterations=4)).isdisjoint(keys(tiny))
    quick = load(str(tiny), quick=True, seeds=[4, 5], iterations=4)
    assert (quick.name, quick.seeds, quick.iterations) == ("tiny-quick", [4, 5], 4)


@pytest.mark.usefixtures("without_figures")
def test_the_command_and_python_take_them(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--seeds", "3,5-6", "--iterations", 2, "--out", out, "--jobs", 1]
    assert run(tiny, *options).exit_code == 0
    study = json.loads((out / "config.json").read_text())["study"]
    assert (study["seeds"], study["iterations"]) == ([3, 5, 6], 2)
    before = contents(out / "runs")
    results = ablate(tiny, out=out, jobs=1, seeds=[3, 5], iterations=2)
    assert set(results.runs["seed"]) == {3, 5}
    assert contents(out / "runs") == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "0,x"], "expected --seeds as 0,1,2 or 0-4, found '0,x'"),
        (["--seeds", "3-"], "found '3-'"),
        (["--seeds", "5-3"], "expected --seeds that rise, as 0-4, found '5-3'"),
        (["--seeds", "0,5-3"], "found '5-3'"),
        (["--seeds", "0-999999999999"], "at most 10000 --seeds, found 1000000000000"),
        (["--seeds", "0-9999,10000"], "at most 10000 --seeds, found 10001"),
        (["--seeds", f"0-{'9' * 5000}"], "expected --seeds as 0,1,2 or 0-4, found '0-99"),
        (["--seeds", "9" * 19], "expected less than 9223372036854775808, found"),
        (["--iterations", "9" * 30], "expected less than or equal to 1000000000, found"),
        (["--jobs", "1000000"], "expected --jobs to be at most 1000, found 1000000"),
        (["--seeds", "1,1"], "given more than once, under --seeds"),
        (["--iterations", "0"], "found 0, under --iterations"),
    ],
)
def test_bad_ones_are_refused_in_one_sentence(
    tiny: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    before = contents(tmp_path)
    result = run(tiny, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_dry_run_times_a_few_steps_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, "--out", tmp_path / "out", "--dry-run", "--jobs", 2)
    assert result.exit_code == 0, result.output
    # three methods at three rates from one seed, and from two more
    assert re.fullmatch(
        r"15 runs, of which 0 are finished\. The others take about \d+ s with 2 processes, "
        r"by \d+ timed steps of mean, agreement, random_weights & co\.\s",
        result.stdout,
    )
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_million_runs_names_none_of_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = ", ".join(str(1 + rate) for rate in range(33))
    study = TINY.replace("0.25, 0.5, 4.0", rates).replace("seeds: 1,", "seeds: 3,")
    tiny.write_text(study.replace("seeds: 3,", f"seeds: {[*range(10, 10_010)]},"))
    made: list[Run] = []

    def make(**keys: Any) -> Run:
        made.append(Run(**keys))
        return made[-1]

    monkeypatch.setattr(sweep, "Run", make)
    result = run(tiny, "--out", tmp_path / "out", "--dry-run", "--jobs", 1)
    # three methods at 33 rates from ten thousand seeds, which are not those of the final runs
    assert result.stdout.startswith("990009 runs, of which 0 are finished. "), result.output
    assert 0 < len(made) < 10_000


@pytest.mark.usefixtures("without_figures")
def test_a_dry_run_goes_by_the_seconds_of_the_runs_that_are_finished(
    tiny: Path, tmp_path: Path
) -> None:
    finished = tmp_path / "finished"
    assert run(tiny, "--out", finished, "--jobs", 1).exit_code == 0
    records = [json.loads(path.read_text()) for path in finished.glob("runs/*.json")]
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    left = [("mean", 5), ("agreement", 6), ("agreement", 5)]
    for path in finished.glob("runs/*.json"):
        record = json.loads(path.read_text())
        method = record["run"]["method"]["name"]
        if (method, record["run"]["seed"]) in left:
            continue
        record["seconds"] = {"mean": 10.0, "agreement": 30.0}.get(method, 1.0)
        (out / "runs" / path.name).write_text(json.dumps(record))
    assert len(records) == 15
    before = contents(tmp_path)
    result = run(tiny, "--out", out, "--dry-run", "--jobs", 1)
    assert "15 runs, of which 12 are finished" in result.stdout
    assert " take about 70 s with 1 process, as those did" in result.stdout  # 10 + 2 · 30
    assert contents(tmp_path) == before
    whole = run(tiny, "--out", finished, "--dry-run")
    assert whole.stdout.strip() == "15 runs, of which 15 are finished."


def test_a_dry_run_counts_rates_beyond_an_edge_and_says_what_will_be_compiled(
    tmp_path: Path,
) -> None:
    study = tmp_path / "study.yaml"
    extended = TINY.replace("schedule: linear", "schedule: linear, extend: 2")
    study.write_text(f"{extended}compile: true\n")
    nothing = run(study, "--out", tmp_path / "out", "--dry-run", "--jobs", 1)
    assert nothing.stdout.startswith("15 runs, of which 0 are finished; up to 6 more")
    assert " take at most about " in nothing.stdout
    assert nothing.stdout.endswith("compiled, as they will be, steps are several times faster.\n")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "seeds: [3, 5, 6]",
            f"seeds: {[*range(10_001)]}",
            "at most 10000 in the list, found 10001",
        ),
        (
            "steps: [0, 1, 2]",
            f"steps: [0, 1, {10**30}]",
            "less than or equal to 1000000, found 1000",
        ),
        ("steps: 2}", f"steps: {10**30}}}", "in 'inner.steps': expected less than or equal to"),
        ("meta_batch: 3", f"meta_batch: {10**12}", "expected less than or equal to 10000, found"),
        ("hidden: [8]", f"hidden: [{10**19}]", "expected less than or equal to 1000000000, found"),
        ("hidden: [8]", f"hidden: [1000000, {10**9}]", "expected a study that fits into memory"),
        (
            "hidden: [8]",
            f"hidden: {[10**9] * 3}",
            "fits into memory, found a network of 2e+18 param",
        ),
        ("support_shots: 10}", f"support_shots: {10**13}}}", "can't allocate memory"),
    ],
)
def test_sizes_that_no_machine_holds_are_refused_in_one_sentence(
    tiny: Path, tmp_path: Path, before: str, after: str, words: str
) -> None:
    tiny.write_text(TINY.replace(before, after, 1))
    result = run(tiny, "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "networks"),
    [
        (("", ""), 13),  # its own, and that of each of the 12 tasks of a test
        (("tasks: 10, steps: 1", "tasks: 20, steps: 1"), 21),  # that rates are chosen by
        (("tasks: 10, steps: 1", "tasks: 20, steps: 0"), 13),
        (("{kind: reptile}", "{kind: anil}"), 1),
    ],
)
def test_a_network_is_refused_from_the_memory_on_that_it_takes(
    change: tuple[str, str], networks: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_text(TINY.replace("support_shots: 10}", "support_shots: 10, query_shots: 5}", 1))
    tiny.write_text(tiny.read_text().replace(*change))
    study = load(str(tiny))
    bytes_needed = networks * 4 * (8 + 8 + 8 + 1)
    monkeypatch.setattr(trial, "memory_of", lambda _: bytes_needed)
    trial.check_memory(study, torch.device("cpu"))
    monkeypatch.setattr(trial, "memory_of", lambda _: bytes_needed - 1)
    with pytest.raises(StudyError, match="a network of 25 parameters, which takes"):
        trial.check_memory(study, torch.device("cpu"))


@pytest.mark.parametrize(
    "model", [f"{{kind: mlp, hidden: [{10**8}]}}", f"{{kind: mlp, hidden: {[10**9] * 3}}}"]
)
def test_of_a_network_that_is_too_large_nothing_is_allocated(
    model: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_text(TINY.replace("{kind: mlp, hidden: [8], activation: tanh}", model))
    monkeypatch.setattr(trial, "memory_of", lambda _: 2**30)
    made = []
    monkeypatch.setattr(sweep, "build_problem", lambda *_: made.append(True))
    result = run(tiny, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "fits into memory, found a network of" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not made and not (tmp_path / "out").exists()
