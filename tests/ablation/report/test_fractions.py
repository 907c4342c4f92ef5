"""A study at several fractions of corrupted tasks: each as if alone, then side by side."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from scipy import stats

from gradagree_opt.ablation.report.figure_corruption import corruption
from gradagree_opt.ablation.report.style import looks
from gradagree_opt.ablation.runs.store import read_config, read_results
from gradagree_opt.ablation.runs.sweep import Part
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.sections import CorruptionSection
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import Run
from gradagree_testing.command import gradagree

FRACTIONS = [0.0, 0.2, 0.5]
RUN = Run(method=Method(name="mean", aggregator="mean"), rate=0.5, seed=3)


@pytest.fixture(scope="module")
def parts(swept: Path) -> list[Part]:
    return read_results(swept, read_config(swept))


def with_corruption(study: Study, **keys: Any) -> Study:
    return study.model_copy(update={"corruption": CorruptionSection(**keys)})


def test_a_run_at_one_of_several_fractions_is_found_again_by_a_study_at_that_one(
    study: Study,
) -> None:
    several = with_corruption(study, kind="outlier_scale", scale=3, fraction=[0, 0.3, 1])
    alone = [with_corruption(study, kind="outlier_scale", scale=3, fraction=f) for f in (0.3, 1.0)]
    keys = [RUN.key(part, None) for part in several.parts()]
    assert keys == [RUN.key(part, None) for part in (study, *alone)]
    assert len(set(keys)) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("place", range(3))
def test_the_block_of_a_fraction_is_the_table_of_a_study_at_that_fraction(
    swept: Path, write_study: Any, tmp_path: Path, place: int
) -> None:
    section = {"kind": "shuffled_labels", "fraction": FRACTIONS[place]}
    corruption = {"corruption": section} if place else {}
    path = write_study(seeds=[3, 5, 6], **corruption)
    assert gradagree("ablate", path, "--out", tmp_path / "alone", "--jobs", 1).exit_code == 0
    for name in ("results.csv", "table.csv"):
        together, alone = (pd.read_csv(folder / name) for folder in (swept, tmp_path / "alone"))
        block = together[together["fraction"] == FRACTIONS[place]].reset_index(drop=True)
        assert list(together.columns) == ["fraction", *alone.columns]
        left_out = ["fraction", "p_holm", "median_seconds"]
        pd.testing.assert_frame_equal(
            block.drop(columns=left_out, errors="ignore"),
            alone.drop(columns=left_out, errors="ignore"),
        )


def test_comparisons_are_paired_within_a_fraction_and_adjusted_over_all(swept: Path) -> None:
    runs = pd.read_csv(swept / "results.csv").query("chosen and steps == 1")
    table = pd.read_csv(swept / "table.csv").set_index(["fraction", "method"])
    p_values = {}
    for fraction in FRACTIONS:
        scores = runs.query("fraction == @fraction").pivot_table("mse", "seed", "method")
        for name in scores.columns.drop("mean"):
            p_values[fraction, name] = stats.ttest_rel(scores[name], scores["mean"]).pvalue
    assert len(p_values) == 6
    largest = 0.0
    for rank, label in enumerate(sorted(p_values, key=lambda label: p_values[label])):
        largest = max(largest, min(1, (6 - rank) * p_values[label]))
        assert table.loc[label, ["p", "p_holm"]].tolist() == pytest.approx(
            [p_values[label], largest]
        )
    notes = (swept / "table.md").read_text()
    assert "adjusted for 6 comparisons, those at all shares together." in notes


def test_the_tables_have_a_block_for_each_fraction(swept: Path) -> None:
    lines = (swept / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:11]]
    assert rows[0][:3] == ["corrupted", "method", "outer rate"]
    assert [row[0] for row in rows[2:]] == ["0 %"] * 3 + ["20 %"] * 3 + ["50 %"] * 3
    tex = (swept / "table.tex").read_text().splitlines()
    body = [line for line in tex if not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{lllrrrrrr}"
    rules = [place for place, line in enumerate(body) if line == r"\midrule"]
    assert rules == [3, 7, 11] and body[8].startswith(r"20 \% & ")


@pytest.mark.usefixtures("without_figures")
def test_the_table_of_all_fractions_fits_a_terminal(swept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(swept, tmp_path / "out")
    result = gradagree("report", folder)
    *table, place = result.stdout.splitlines()
    assert place == f"written to {folder}"  # as long as it is
    assert result.exit_code == 0 and max(map(len, table)) <= 80
    for words in ("corrupted", "50 %", "1 step", "minus mean"):
        assert words in result.stdout
    assert "2 steps" not in result.stdout


@pytest.mark.usefixtures("without_pictures")
def test_every_artefact_is_rebuilt_to_the_bit(swept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(swept, tmp_path / "out"))
    names = [path.name for path in swept.iterdir() if path.is_file()]
    for name in names:
        (folder / name).unlink() if name != "config.json" else None
    assert gradagree("report", folder).exit_code == 0
    assert {"corruption.png", "learning-curves.pdf"} < set(names)
    for name in names:
        assert (folder / name).read_bytes() == (swept / name).read_bytes(), name


@pytest.mark.usefixtures("without_figures")
def test_missing_runs_are_counted_over_all_fractions(swept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(swept, tmp_path / "out"))
    for part in read_results(swept, read_config(swept))[1:]:
        key = part.final("mean")[2].run.key(part.study, None)
        (folder / "runs" / f"{key}.json").unlink()
    assert "2 of 36 runs" in gradagree("report", folder).stderr  # 3 fractions × 3 methods × (2 + 2)


@pytest.mark.usefixtures("without_figures")
def test_at_fraction_0_foreign_data_play_no_part(write_study: Any, tmp_path: Path) -> None:
    keys = {"kind": "foreign", "foreign": "Spruce", "fraction": [0, 0.5]}
    test = {"tasks": 4, "support_shots": 5, "query_shots": 3, "steps": [0, 1]}
    changes = {"tasks": {"kind": "sine", "support_shots": 10}, "test": test}
    out = tmp_path / "out"
    path = write_study(corruption=keys, **changes)
    assert gradagree("ablate", path, "--out", out, "--jobs", 1).exit_code == 0
    assert gradagree("report", out).exit_code == 0
    clean, spoilt = read_results(out, config := read_config(out))
    assert config.clean_sha256 is None and config.data_sha256 is not None
    for part, digest in ((clean, None), (spoilt, config.data_sha256)):
        for record in part.records.values():
            assert (out / "runs" / f"{record.run.key(part.study, digest)}.npz").exists()


def lines(axes: Axes, name: str) -> list[float]:
    [line] = [x for x in axes.get_lines() if x.get_label() == name]
    assert np.asarray(line.get_xdata()).tolist() == pytest.approx(FRACTIONS, abs=0.01)
    return np.asarray(line.get_ydata()).tolist()


def test_the_figure_shows_each_method_at_the_rate_tuned_for_the_fraction(
    swept: Path, parts: list[Part]
) -> None:
    runs = pd.read_csv(swept / "results.csv").query("chosen and steps == 1")
    grouped = runs.set_index(["method", "fraction"])["mse"].sort_index()
    axes = corruption(parts).axes[0]
    for name, bars in zip(looks(parts[0].study), axes.collections, strict=True):
        scores = [grouped.loc[name, fraction] for fraction in FRACTIONS]
        assert lines(axes, name) == pytest.approx([values.mean() for values in scores])
        for bar, values in zip(bars.get_segments(), scores, strict=True):
            expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
            assert bar[:, 1].tolist() == pytest.approx([expected.low, expected.high])


def test_a_fraction_at_which_a_method_diverges_is_a_gap_and_a_cross(parts: list[Part]) -> None:
    record = parts[1].final("agreement")[0]
    lost = record.model_copy(update={"test": dict.fromkeys(record.test, math.inf)})
    spoilt = Part(parts[1].study, parts[1].records | {record.run.label: lost}, parts[1].rates)
    axes = corruption([parts[0], spoilt, parts[2]]).axes[0]
    shown = lines(axes, "agreement")
    assert math.isnan(shown[1]) and np.isfinite([shown[0], shown[2]]).all()
    crosses = [x for x in axes.get_lines() if x.get_marker() == "x" and len(x.get_xdata())]
    assert len(crosses) == 1
    assert np.asarray(crosses[0].get_xdata()).tolist() == pytest.approx([0.2], abs=0.01)
    assert crosses[0].get_color() == looks(parts[0].study)["agreement"].color


def test_the_page_says_which_fraction_a_figure_shows(swept: Path) -> None:
    page = (swept / "report.html").read_text(encoding="utf-8")
    captions = dict(
        zip(
            re.findall(r'<figure id="figure-([^"]*)"', page),
            re.findall(r"<figcaption>(.*?)</figcaption>", page),
            strict=True,
        )
    )
    said = {name for name, text in captions.items() if "50 % of the training tasks" in text}
    assert said == captions.keys() - {"corruption"} and len(said) >= 4
