"""A study small enough to be run whole in a test."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

import gradagree_testing.forked  # noqa: F401  # before a study has workers: one process serves all

if TYPE_CHECKING:
    from gradagree_opt.ablation.study.study import Study

TINY = """\
name: tiny
title: Tiny sine
tasks: {kind: sine, support_shots: 10}
model: {kind: mlp, hidden: [8], activation: tanh}
form: {kind: reptile}
inner:
  lr: 0.02
  steps: 2
  batch_size: 5
outer: {optimizer: sgd, rates: [0.25, 0.5], schedule: linear}
iterations: 5
meta_batch: 3
seeds: [3, 5]
tuning: {seeds: 1, tasks: 10, steps: 1}
test: {tasks: 12, support_shots: 5, query_shots: 7, steps: [0, 1, 2]}
methods:
  - {name: mean, aggregator: mean}
  - name: agreement
    aggregator: gradient_agreement
    options:
      negative: clip
  - {name: "random_weights & co", aggregator: random_weights}
baseline: mean
quick:
  iterations: 3
  tuning: {tasks: 5}
"""

DIGITS = """\
name: tiny-digits
title: Tiny pairs of digits
tasks: {kind: digits, support_shots: 9}
model: {kind: mlp, hidden: [7, 5], activation: tanh}
form: {kind: multi-task}
outer: {optimizer: sgd, rates: [0.5, 1.0], schedule: linear}
iterations: 6
meta_batch: 6
seeds: [3, 5]
tuning: {seeds: 1, tasks: 6, steps: 0}
test: {tasks: 6, query_shots: 40, steps: [0]}
methods:
  - {name: mean, aggregator: mean}
  - {name: agreement, aggregator: gradient_agreement}
  - {name: cosine, aggregator: gradient_agreement, options: {similarity: cosine}}
  - {name: equal, aggregator: equal_agreement}
baseline: mean
quick: {iterations: 4}
"""

SHUFFLED = {"kind": "shuffled_labels", "fraction": [0, 0.2, 0.5]}

WriteStudy = Callable[..., Path]


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    """The tiny study as a file, its lines as above."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def study(study_file: Path) -> "Study":
    from gradagree_opt.ablation.study.loading import load

    return load(str(study_file))


@pytest.fixture
def write_study(tmp_path: Path) -> WriteStudy:
    """Writes the tiny study with some of its top-level keys replaced."""

    def write(**changes: object) -> Path:
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(TINY) | changes, sort_keys=False))
        return path

    return write


@pytest.fixture
def write_digits(tmp_path: Path) -> WriteStudy:
    """Writes the tiny multi-task study with some of its top-level keys replaced."""

    def write(**changes: object) -> Path:
        path = tmp_path / "digits.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(DIGITS) | changes, sort_keys=False))
        return path

    return write


@pytest.fixture
def digits(write_digits: WriteStudy) -> "Study":
    from gradagree_opt.ablation.study.loading import load

    return load(str(write_digits()))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the tiny study, its pictures empty; not to be changed."""
    return run_whole(TINY, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the tiny study at three fractions of corrupted tasks, as above."""
    study = yaml.safe_load(TINY) | {"corruption": SHUFFLED, "seeds": [3, 5, 6]}
    return run_whole(yaml.safe_dump(study, sort_keys=False), tmp_path_factory.mktemp("swept"))


def run_whole(study: str, folder: Path) -> Path:
    from gradagree_testing.command import gradagree, leave_pictures_empty

    (folder / "tiny.yaml").write_text(study)
    with pytest.MonkeyPatch.context() as patch:
        leave_pictures_empty(patch)
        result = gradagree("ablate", folder / "tiny.yaml", "--out", folder / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The same folder, for the test to change."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))
