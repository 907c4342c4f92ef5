"""The command run in this process, and a tiny study that it runs to the end."""

from pathlib import Path

import pytest
from typer.testing import Result

from gradagree_testing.command import gradagree

TINY = """\
name: tiny
title: Tiny sine
tasks: {kind: sine, support_shots: 10}
model: {kind: mlp, hidden: [8], activation: tanh}
form: {kind: reptile}
inner: {lr: 0.02, steps: 2}
outer: {optimizer: sgd, rates: [0.25, 0.5, 4.0], schedule: linear}
iterations: 5
meta_batch: 3
seeds: [3, 5, 6]
tuning: {seeds: 1, tasks: 10, steps: 1}
test: {tasks: 12, support_shots: 5, query_shots: 7, steps: [0, 1, 2]}
methods:
  - {name: mean, aggregator: mean}
  - {name: agreement, aggregator: gradient_agreement}
  - {name: "random_weights & co", aggregator: random_weights}
baseline: mean
quick: {seeds: [3], iterations: 2}
"""
FIGURES = {
    "adaptation",
    "agreement",
    "agreement-matrix",
    "learning-curves",
    "seconds",
    "tuned-rates",
}
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


def ablate(*arguments: object) -> Result:
    return gradagree("ablate", *arguments)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the tiny study, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    result = ablate(folder / "tiny.yaml", "--out", folder / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    return folder / "out"
