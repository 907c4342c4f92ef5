"""Studies of each kind of tasks that needs data, from beginning to end."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gradagree_testing.photographs import write_photographs

from .conftest import FILES, TINY, ablate

pytestmark = pytest.mark.slow
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


@pytest.mark.parametrize(
    "model",
    [
        "kind: conv4, filters: 4",
        "kind: conv4, filters: 4, network: finn",
        "kind: mlp, hidden: [8, 4], batch_norm: true",
    ],
)
@pytest.mark.parametrize("form", ["reptile", "maml"])
@pytest.mark.usefixtures("without_pictures")
def test_an_omniglot_study_runs_from_an_archive(tmp_path: Path, model: str, form: str) -> None:
    study, data = tmp_path / "study.yaml", tmp_path / "drawings.npz"
    study.write_text(
        OMNIGLOT.replace("kind: conv4, filters: 4", model).replace("kind: reptile", f"kind: {form}")
    )
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


@pytest.mark.usefixtures("without_figures")
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


@pytest.mark.usefixtures("without_figures")
def test_a_mini_imagenet_study_runs_from_a_folder_and_knows_its_images(tmp_path: Path) -> None:
    study = OMNIGLOT.replace("kind: omniglot, way: 3", "kind: mini-imagenet, way: 2")
    (tmp_path / "study.yaml").write_text(study)
    write_photographs(tmp_path)
    out = tmp_path / "out"
    result = ablate(tmp_path / "study.yaml", "--data", tmp_path, "--out", out, "--jobs", 1)
    assert result.exit_code == 0, result.output
    accuracy = pd.read_csv(out / "results.csv")["accuracy"]
    # 4 tasks of 2 classes with 2 query images each: accuracies are multiples of 1/16
    assert accuracy.between(0, 1).all()
    assert np.allclose((accuracy * 16).round(), accuracy * 16, atol=1e-4)
    assert "1 example of each class" in (out / "table.md").read_text()
    digest = json.loads((out / "config.json").read_text())["data_sha256"]
    Image.new("RGB", (90, 84)).save(tmp_path / "n1/0.jpg")
    for array in (tmp_path / "cache").iterdir():
        array.unlink()
    again = tmp_path / "again"
    ablate(tmp_path / "study.yaml", "--data", tmp_path, "--out", again, "--jobs", 1)
    assert json.loads((again / "config.json").read_text())["data_sha256"] != digest
