"""What a finished study leaves: its files, opened and read back."""

import json
import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gradagree_testing.command import TIMED

from .conftest import FIGURES, FILES, TINY, ablate


def test_all_files_are_written_and_nothing_else(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES | {"runs"}
    records = {path.suffix for path in (finished / "runs").iterdir()}
    assert records == {".json", ".npz"}


def test_results_hold_every_run_at_every_step(finished: Path) -> None:
    results = pd.read_csv(finished / "results.csv")
    assert len(results) == 3 * (3 + 2) * 3  # methods × (rates + further seeds) × steps
    assert not results.duplicated(["method", "rate", "seed", "steps"]).any()
    assert results.query("chosen").groupby("method")["rate"].nunique().eq(1).all()
    tuned = results.query("seed == 3 and steps == 0").set_index(["method", "rate"])
    best = tuned["validation_loss"].groupby("method").idxmin()
    assert all(tuned["chosen"][label] for label in best)


def test_the_table_shows_means_intervals_and_paired_differences_of_the_results(
    finished: Path,
) -> None:
    results = pd.read_csv(finished / "results.csv").query("chosen")
    lines = (finished / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert rows[0] == [
        *("method", "outer rate", "0 steps", "1 step", "2 steps"),
        *("minus mean", "p (Holm)", "effect size"),
    ]
    after_one = results.query("steps == 1").pivot_table("mse", "seed", "method")
    assert [row[0] for row in rows[2:]] == list(after_one.mean().sort_values().index)
    for name, rate, _, cell, _, difference, p, size in rows[2:]:
        expected = stats.ttest_1samp(after_one[name], 0).confidence_interval(0.95)
        middle, half = (expected.low + expected.high) / 2, (expected.high - expected.low) / 2
        assert cell == f"{middle:.4f} ± {half:.4f}"
        assert float(rate.rstrip("†")) == results.query("method == @name")["rate"].iloc[0]
        assert rate.endswith("†") == (float(rate.rstrip("†")) in (0.25, 4.0))
        if name == "mean":
            assert difference == p == size == ""
            continue
        paired = stats.ttest_rel(after_one[name], after_one["mean"]).confidence_interval(0.95)
        middle, half = (paired.low + paired.high) / 2, (paired.high - paired.low) / 2
        assert difference == f"{middle:+.4f} ± {half:.4f}"
        differences = after_one[name] - after_one["mean"]
        # of three seeds: Γ(1) / (√1 Γ(1/2)) = 1 / √π
        expected_size = differences.mean() / differences.std() / math.sqrt(math.pi)
        assert size == f"{expected_size:+.2f}"
    p_values = {
        name: stats.ttest_rel(after_one[name], after_one["mean"]).pvalue
        for name in after_one
        if name != "mean"
    }
    smaller, larger = sorted(p_values.values())  # Holm's method for two: 2 p and the larger of both
    adjusted = {smaller: min(1, 2 * smaller), larger: max(min(1, 2 * smaller), larger)}
    shown = {row[0]: row[6] for row in rows[2:] if row[0] != "mean"}
    for name, p in p_values.items():
        assert shown[name] == ("< 0.001" if adjusted[p] < 0.001 else f"{adjusted[p]:.3f}")
    table = pd.read_csv(finished / "table.csv").set_index("method")
    assert list(table.index) == [row[0] for row in rows[2:]]
    assert table["mean_1_steps"].tolist() == pytest.approx(after_one.mean()[table.index].tolist())
    records = [json.loads(path.read_bytes()) for path in finished.glob("runs/*.json")]
    for name, rate in table["rate"].items():
        runs = [(r["run"]["method"]["name"], r["run"]["rate"], r["seconds"]) for r in records]
        expected_seconds = np.median([took for *label, took in runs if label == [name, rate]])
        assert table.loc[name, "median_seconds"] == pytest.approx(expected_seconds)
    for name, p in p_values.items():
        assert table.loc[name, ["p", "p_holm"]].tolist() == pytest.approx([p, adjusted[p]])
    assert table.loc["mean", "difference":"effect_size"].isna().all()


def test_the_latex_table_is_booktabs_with_the_cells_of_the_markdown(finished: Path) -> None:
    lines = (finished / "table.tex").read_text().splitlines()
    body = [line for line in lines if not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{llrrrrrr}" and body[-1] == r"\end{tabular}"
    assert body[1] == r"\toprule" and body[3] == r"\midrule" and body[-2] == r"\bottomrule"
    rows = [line.removesuffix(r" \\") for line in body if line.endswith(r"\\")]
    markdown = (finished / "table.md").read_text().splitlines()
    for row, line in zip(rows[1:], markdown[2:5], strict=True):
        expected = line[2:-2].replace("±", r"$\pm$").replace("†", r"$^\dagger$")
        expected = re.sub(r"(?<=\| )-(?=\d)", "$-$", expected.replace("<", "$<$"))
        expected = expected.replace("random_weights & co", r"random\_weights \& co")
        assert [c.strip() for c in row.replace(r"\&", "＆").split("&")] == [
            c.strip() for c in expected.replace(r"\&", "＆").split("|")
        ]


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_the_figures_are_pictures_with_something_on_them(finished: Path, name: str) -> None:
    path = finished / f"{name}.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 300 and picture.shape[1] > 1000
    assert len(np.unique(picture[::5, ::5].reshape(-1, picture.shape[-1]), axis=0)) > 50


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_the_pdf_is_vectors_with_embedded_truetype_fonts_and_no_date(
    finished: Path, name: str
) -> None:
    content = (finished / f"{name}.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert b"/FontFile2" in content and b"/Type3" not in content
    assert b"/Subtype /Image" not in content and b"/CreationDate" not in content


@pytest.mark.slow
def test_config_reproduces_every_artefact_to_the_bit_but_for_the_seconds_that_runs_took(
    finished: Path, tmp_path: Path
) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["study"]["name"] == "tiny" and config["study"]["seeds"] == [3, 5, 6]
    assert config["packages"]["torch"] and config["command"][0] == "gradagree"
    result = ablate(finished / "config.json", "--out", tmp_path / "again", "--jobs", 1)
    assert result.exit_code == 0
    folders = finished, tmp_path / "again"
    for name in FILES - TIMED - {"config.json"}:
        first, again = ((folder / name).read_bytes() for folder in folders)
        assert first == again, name
    tables = [pd.read_csv(folder / "table.csv", dtype=str) for folder in folders]
    pd.testing.assert_frame_equal(*(table.drop(columns="median_seconds") for table in tables))
    pages = [(folder / "report.html").read_text() for folder in folders]
    drawn = re.compile(r'<figure id="figure-seconds">.*?</svg>', re.DOTALL)
    assert all(len(drawn.findall(page)) == 1 for page in pages)
    assert drawn.sub("", pages[0]) == drawn.sub("", pages[1])


@pytest.mark.usefixtures("without_figures")
def test_a_single_seed_has_no_p_value_nor_effect_size(tiny: Path, tmp_path: Path) -> None:
    assert ablate(tiny, "--quick", "--out", tmp_path / "out", "--jobs", 1).exit_code == 0
    text = (tmp_path / "out/table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()[2:5]]
    assert all(row[-3:] == ["", "", ""] for row in rows)
    assert "t-test" not in text and "Hedges" not in text
    table = pd.read_csv(tmp_path / "out/table.csv")
    assert table[["p", "p_holm", "effect_size", "difference_half_width"]].isna().all(axis=None)


@pytest.mark.usefixtures("without_pictures")
def test_a_study_whose_runs_all_diverge_says_so_in_its_table(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("[0.25, 0.5, 4.0]", "[1e30]"))
    assert ablate(path, "--quick", "--out", tmp_path / "out", "--jobs", 1).exit_code == 0
    rows = (tmp_path / "out/table.md").read_text().splitlines()[2:5]
    assert all(row.count("diverged") >= 3 for row in rows)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {name for name in FILES if "matrix" not in name} | {"runs"}
