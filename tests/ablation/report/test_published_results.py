"""The results in docs/: what stands there is what their recorded runs give."""

import io
import json
import re
import runpy
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import pandas as pd
import pytest

from gradagree_opt.ablation.report import layouts
from gradagree_opt.ablation.report.citations import bibtex, methods_text
from gradagree_opt.ablation.report.report import build_report
from gradagree_opt.ablation.runs.store import read_config, read_results

DOCS = Path(__file__).parents[3] / "docs"
RESULTS = DOCS / "results"
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")
INTERVAL = re.compile(r"[+-]?\d+\.\d+ ± \d+\.\d+")
STUDIES = sorted(path.parent for path in RESULTS.glob("*/config.json"))
SECTIONS = {
    "Equal Agreement on sines": "equal-sine",
    "Equal Agreement with Adam outside": "equal-sine-adam",
    "Equal Agreement where tasks are spoilt": "equal-sine-corrupted",
    "One family: the error over the power of the Gram matrix": "gramian-powers",
    "Equal Agreement in MAML": "equal-sine-maml",
    "Equal Agreement in MAML, by displacements": "equal-sine-maml-displacement",
    "What the damping of Equal Agreement costs": "damping",
    "Equal Agreement beside TorchJD's aggregators": "equal-sine-torchjd",
    "Equal Agreement on few-shot images": "equal-omniglot-5way-1shot",
    "Equal Agreement in multi-task learning": "multi-task-digits",
    "Multi-task learning beside TorchJD's aggregators": "multi-task-digits-torchjd",
    "Sines": "sine",
    "Corrupted tasks": "sine-corrupted",
    "Spruces": "grouped",
}
SUMMARY = {
    "sines, rates chosen on other seeds": ("equal-sine", ""),
    "sines, Adam outside, 10 000 steps": ("equal-sine-adam", ""),
    "sines, half of the tasks shuffled, 2000 steps": ("equal-sine-corrupted", "50 %"),
    "sines, a tenth of the tasks flipped, 2000 steps": ("equal-sine-flipped", ""),
    "sines, a tenth ten times as large, 2000 steps": ("equal-sine-scale", ""),
    "sines, noise on all targets, 2000 steps": ("equal-sine-noise", ""),
    "sines, three in ten tasks foreign, 2000 steps": ("equal-sine-foreign", ""),
    "Finn's sines, MAML, Adam outside, 2000 steps": ("equal-sine-maml", ""),
    "Omniglot 5-way 1-shot, 500 steps": ("equal-omniglot-5way-1shot", ""),
    "Omniglot 5-way 1-shot, Adam inside, 200 steps": ("equal-omniglot-5way-1shot-adam", ""),
    "Omniglot 20-way 1-shot, 200 steps": ("equal-omniglot-20way-1shot", ""),
    "sines, two tasks in a batch, 2000 steps": ("tasks-per-batch-2", ""),
    "spruces in folds, MAML, Adam outside, 1000 steps": ("equal-grouped", ""),
    "boys in folds, MAML, Adam outside, 1000 steps": ("equal-grouped-oxboys", ""),
    "digits, multi-task, Adam, 2000 steps": ("multi-task-digits", ""),
    "sines": ("sine", ""),
    "sines, half of the tasks corrupted": ("sine-corrupted", "50 %"),
    "spruces, MAML": ("grouped", ""),
}
COLUMNS = {  # of tables that compare studies
    "three in ten tasks shuffled": "equal-sine-torchjd-corrupted",
    "three in ten tasks foreign": "equal-sine-torchjd-foreign",
    "noise on all targets": "equal-sine-torchjd-noise",
    "one in ten tasks large": "equal-sine-torchjd-scale",
    "one in ten tasks flipped": "equal-sine-torchjd-flipped",
    "Adam outside": "equal-sine-torchjd-adam",
    "Finn's sines, MAML with Adam": "equal-sine-torchjd-maml",
    "spruces in folds, MAML with Adam": "equal-grouped-torchjd",
    "Omniglot 5-way 1-shot, 16 filters": "equal-omniglot-5way-1shot-torchjd",
    "a tenth flipped": "equal-sine-flipped",
    "a tenth ten times as large": "equal-sine-scale",
    "noisy targets": "equal-sine-noise",
    "three in ten foreign": "equal-sine-foreign",
    "2": "tasks-per-batch-2",
    "5": "tasks-per-batch-5",
    "10": "tasks-per-batch",
    "25": "tasks-per-batch-25",
    "50": "tasks-per-batch-50",
    "spruces": "equal-grouped",
    "milk": "equal-grouped-milk",
    "chicks": "equal-grouped-chickweight",
    "boys": "equal-grouped-oxboys",
    "sleep": "equal-grouped-sleepstudy",
    "mares": "equal-grouped-ovary",
    "milk, 150 steps": "equal-grouped-milk-torchjd",
    "mares, 150 steps": "equal-grouped-ovary-torchjd",
}
STEPS = "5 steps"  # of the page's summaries: "All after five gradient steps."
ROWS = {"ours: Reptile, the mean": "mean", "ours: Gradient Agreement": "agreement"}

Table: TypeAlias = list[list[str]]
Pairs: TypeAlias = Iterator[tuple[str, str]]
"""A cell of the page, and what the records of its study have in its place."""


@pytest.mark.slow
@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_tables_and_citations_are_those_of_the_recorded_runs(folder: Path) -> None:
    config = read_config(folder)
    report = build_report(read_results(folder, config))
    written = {
        "results.csv": report.runs.to_csv(index=False),
        "table.md": layouts.markdown(report),
        "table.tex": layouts.latex(report),
        "methods.md": methods_text(config),
        "references.bib": bibtex(config),
    }
    for name, text in written.items():
        assert (folder / name).read_text(encoding="utf-8") == text, name
    # Its last digits are those of the releases that wrote it.
    numbers, there = report.numbers.to_csv(index=False), (folder / "table.csv").read_text("utf-8")
    if all(version(name) == config.packages[name] for name in ("numpy", "pandas", "scipy")):
        assert numbers == there
    both = (pd.read_csv(io.StringIO(text)) for text in (numbers, there))
    pd.testing.assert_frame_equal(*both, rtol=1e-9)


def tables_in(text: str) -> Iterator[Table]:
    """The Markdown tables of a text, their header first, without emphasis."""
    for block in re.findall(r"(?:^ *\|.*\n)+", text, re.MULTILINE):
        lines = [line.strip()[1:-1].split("|") for line in block.splitlines()]
        header, _, *body = [[cell.strip(" *") for cell in line] for line in lines]
        yield [header, *body]


@cache
def recorded(study: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a study's table by share of corrupted tasks ("" where it is one) and method."""
    [[header, *body]] = tables_in((RESULTS / study / "table.md").read_text(encoding="utf-8"))
    rows = [dict(zip(header, row, strict=True)) for row in body]
    return {(row.get("corrupted", ""), row["method"]): row for row in rows}


def score(study: str, label: str, share: str = "", steps: str = STEPS) -> str:
    """Of a method, or of its difference to the mean; nothing for one that the study is without."""
    method = label.removesuffix(" minus mean")
    row = recorded(study).get((share, method), {})
    if method != label:
        return row.get("minus mean", "")
    return row.get(steps) or row.get("test", "")  # of multi-task learning, where nothing adapts


def steps_in(text: str) -> str:
    [found] = re.findall(r"after (\d+ steps?)", text)
    return str(found)


def of_a_study(study: str, header: list[str], body: Table) -> Pairs:
    for method, *cells in body:
        row = recorded(study)["", method]
        for column, cell in zip(header[1:], cells, strict=True):
            if column.startswith("minus mean, after"):
                assert steps_in(column) == STEPS
                yield cell, row["minus mean"]
            elif column in row:
                yield cell, row[column]
            else:
                yield cell, row[steps_in(column)]


def of_tuning(study: str, header: list[str], body: Table) -> Pairs:
    runs = pd.read_csv(RESULTS / study / "results.csv")
    first = json.loads((RESULTS / study / "config.json").read_text())["study"]["seeds"][0]
    losses = runs[runs["seed"] == first].groupby(["method", "rate"])["validation_loss"].first()
    for method, *cells in body:
        for rate, cell in zip(header[1:], cells, strict=True):
            yield cell, f"{losses[method, float(rate)]:.3f}"


def of_shares(study: str, header: list[str], body: Table) -> Pairs:
    for label, *cells in body:
        for share, cell in zip(header[1:], cells, strict=True):
            row = recorded(study).get((share, label), {"outer rate": ""})
            edge = "†" * row["outer rate"].endswith("†")
            yield cell, score(study, label, share, steps_in(header[0])) + edge


def of_studies(_: str, header: list[str], body: Table) -> Pairs:
    for label, *cells in body:
        for column, cell in zip(header[1:], cells, strict=True):
            study = COLUMNS[column]
            row = recorded(study).get(("", label), {"outer rate": ""})
            edge = "†" * row["outer rate"].endswith("†")
            yield cell, score(study, label, "", steps_in(header[0])) + edge


def of_ways(_: str, header: list[str], body: Table) -> Pairs:
    for label, *cells in body:
        for column, cell in zip(header[1:], cells, strict=True):
            study = omniglot(column)
            expected = score(study, label, "", steps_in(header[0]))
            if row := recorded(study).get(("", label)):
                expected += f" ({row['outer rate']})"
            yield cell.strip("–"), expected


def of_summary(_: str, header: list[str], body: Table) -> Pairs:
    for name, *cells in body:
        study, share = SUMMARY.get(name) or (omniglot(name), "")
        for label, cell in zip(header[1:], cells, strict=True):
            row = recorded(study).get((share, label), {"outer rate": ""})
            yield cell, score(study, label, share) + "†" * row["outer rate"].endswith("†")


def of_the_paper(_: str, header: list[str], body: Table) -> Pairs:
    data = ""
    for place, column in enumerate(header[1:], start=1):
        data = column.removesuffix(column.split()[-1]).strip().lower() or data
        study = re.sub(r"(\d+)w(\d+)s", rf"{data}-\1way-\2shot", column.split()[-1])
        for row in body:
            if not row[0].startswith("paper: "):
                there = (RESULTS / study).exists()
                yield row[place], score(study, ROWS[row[0]]) if there else "not run here"


def omniglot(text: str) -> str:
    """The study of a column or a row that names ways and shots."""
    [(way, shot)] = re.findall(r"(\d+)-way (\d+)-shot", text)
    return f"omniglot-{way}way-{shot}shot"


KINDS: dict[str, Callable[[str, list[str], Table], Pairs]] = {  # by how the header begins
    "method": of_a_study,
    "validation loss of the first seed, by outer rate": of_tuning,
    "MSE after 5 steps, by share": of_shares,
    "MSE after": of_studies,
    "accuracy after": of_studies,
    "accuracy in % after": of_ways,
    "study": of_summary,
    "you train": lambda *_: iter(()),  # words alone
    "": of_the_paper,
}


def test_every_cell_on_the_page_is_that_of_its_study_method_and_steps() -> None:
    checked = 0
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        name = section.partition("\n")[0]
        for header, *body in tables_in(section):
            kind = next(kind for start, kind in KINDS.items() if header[0].startswith(start))
            for cell, expected in kind(SECTIONS.get(name, ""), header, body):
                assert cell == expected, (name, header)
                checked += bool(cell)
    assert checked > 100


def test_the_curve_over_the_powers_is_that_of_the_recorded_table() -> None:
    script = runpy.run_path(str(DOCS / "figures/gramian_powers.py"))
    [line, *_] = script["draw"]().axes[0].lines
    drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    rows = {label: row for (_, label), row in recorded("gramian-powers").items()}
    for power in (-1, -0.5, 0, 0.5, 1, 2):
        cell = rows[f"k = {power:g}" if power else "mean"][STEPS]
        assert f"{drawn[power]:.4f}" == cell.split()[0]
    assert len(drawn) == 6


def test_the_curves_over_the_tasks_in_a_batch_are_those_of_the_recorded_tables() -> None:
    script = runpy.run_path(str(DOCS / "figures/tasks_per_batch.py"))
    drawn = [container.lines[0] for container in script["draw"]().axes[0].containers]
    for method, line in zip(script["METHODS"], drawn, strict=True):
        points = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        assert [*points] == [2, 5, 10, 25, 50]
        for n, error in points.items():
            cell = recorded(script["STUDIES"][n])["", method][STEPS]
            assert f"{error:.4f}" == cell.split()[0]


def test_the_curve_over_the_damping_is_that_of_the_recorded_table() -> None:
    script = runpy.run_path(str(DOCS / "figures/damping.py"))
    [line, *_] = script["draw"]().axes[0].lines
    drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    rows = {label: row[STEPS] for (_, label), row in recorded("damping").items()}
    mean = rows.pop("mean").split()[0]
    assert {f"λ = {x:g}": f"{y:.4f}" for x, y in drawn.items()} == {
        label: cell.split()[0] for label, cell in rows.items()
    }
    dashed = next(line for line in script["draw"]().axes[0].lines if line.get_label() == "mean")
    assert f"{dashed.get_ydata()[0]:.4f}" == mean


def test_what_is_said_of_step_length_is_of_the_mean_at_agreements_length() -> None:
    [said] = re.findall(r"What step length explains: (.*?)\n\n", PAGE, re.DOTALL)
    studies = [("sine", ""), ("sine-corrupted", "0 %")]
    studies += [(f"omniglot-{task}", "") for task in ("5way-1shot", "5way-5shot", "20way-1shot")]
    label = "mean at agreement's length minus mean"
    assert INTERVAL.findall(said) == [score(study, label, share) for study, share in studies]


def test_no_interval_stands_elsewhere_on_the_page() -> None:
    """Those in tables and of step length are checked above."""
    prose = re.sub(
        r"^ *\|.*$|What step length explains: [\s\S]*?\n\n", "", PAGE, flags=re.MULTILINE
    )
    assert INTERVAL.findall(prose) == []
