"""The claim at a size that a test can check: Equal Agreement against a tuned mean on sines."""

from pathlib import Path

import pytest
import yaml

from gradagree_opt.ablation.report.tables import scores
from gradagree_opt.ablation.runs.sweep import Sweep
from gradagree_opt.ablation.study.loading import load

CLAIM = {
    "extends": "equal-sine",
    "name": "small-claim",
    "title": "Sines, Reptile, 600 outer steps",
    "iterations": 600,
    "compile": False,
    "outer": {"rates": [0.5, 1.0, 2.0, 4.0], "extend": 0},
    "seeds": [0],
    "tuning": {"seeds": 1, "tasks": 200, "steps": 5},  # the seed above, so no run is trained twice
    "test": {"tasks": 500, "steps": [5]},
    "methods": [
        {"name": "mean", "aggregator": "mean"},
        {"name": "equal", "aggregator": "equal_agreement", "rates": [0.25, 0.5, 1.0, 2.0]},
    ],
}


@pytest.mark.slow
@pytest.mark.long
def test_equal_agreement_has_less_than_two_fifths_of_the_tuned_mean_s_error(
    tmp_path: Path, without_type_checks: None
):
    (tmp_path / "claim.yaml").write_text(yaml.safe_dump(CLAIM))
    study = load(str(tmp_path / "claim.yaml"))
    sweep = Sweep(study, tmp_path, None, pytest.fail)
    results = sweep.run(jobs=1, report=lambda _: None)
    [mean], [equal] = (scores(results.final(name), 5).values() for name in ("mean", "equal"))
    assert not any(results.at_edge(name) for name in ("mean", "equal"))
    assert equal < 0.4 * mean
