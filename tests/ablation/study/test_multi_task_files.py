"""A multi-task study as a file: what is a mistake in it, and the command from it to the page."""

import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_testing.command import contents, gradagree

from ..conftest import WriteStudy


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_a_quick_study_is_run_whole_goes_on_and_is_reported_and_cited(
    write_digits: WriteStudy, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["ablate", write_digits(), "--quick", "--out", out, "--jobs", 1]
    done = gradagree(*command)
    assert done.exit_code == 0, done.output
    written = contents(out)
    for record in sorted((out / "runs").glob("*.json"))[:2]:
        record.unlink()
        record.with_suffix(".npz").unlink()
    assert gradagree("report", out).exit_code == 2
    assert gradagree(*command).exit_code == 0
    again = contents(out)
    assert again.keys() == written.keys()
    same = [name for name in again if name.endswith(("methods.md", ".bib"))]
    assert all(again[name] == written[name] for name in same)
    found, expected = (pd.read_csv(BytesIO(c[str(out / "results.csv")])) for c in (again, written))
    pd.testing.assert_frame_equal(found, expected)  # up to rounding: runs were grouped otherwise
    assert gradagree("report", out).exit_code == 0
    assert contents(out).keys() == written.keys()
    assert {"agreement-matrix.png", "learning-curves.pdf"} <= {path.name for path in out.iterdir()}
    cited = gradagree("cite", out).stdout
    for key in (
        "sener2018multi",
        "sabour2017dynamic",
        "alpaydin1998cascading",
        "pedregosa2011scikit",
    ):
        assert f"@{key}]" in cited and f"{{{key}," in cited
    version = yaml.safe_load((out / "config.json").read_text())["packages"]["scikit-learn"]
    assert f"scikit-learn {version} [@pedregosa2011scikit]" in cited
    for text in (cited, (out / "table.md").read_text(), (out / "report.html").read_text()):
        assert "gradient step" not in text and "0 steps" not in text


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inner": {"lr": 0.1, "steps": 1}}, "in 'inner': expected null, found"),
        (
            {"corruption": {"kind": "shuffled_labels", "fraction": 0.5}},
            "in 'corruption': expected null, found",
        ),
        (
            {"corruption": {"kind": "flipped", "fraction": 0.5, "scale": 2.0}},
            "in 'corruption': expected null, found",
        ),
        ({"meta_batch": 5}, "line 21 in 'meta_batch': expected 6, found 5: multi-task training"),
        (
            {"tuning": {"seeds": 1, "tasks": 7, "steps": 0}},
            "in 'tuning.tasks': expected 6, found 7",
        ),
        ({"test": {"tasks": 5, "query_shots": 4, "steps": [0]}}, "in 'test.tasks': expected 6"),
        (
            {"test": {"tasks": 6, "query_shots": 4, "steps": [0, 1]}},
            "in 'test.steps': expected [0], found [0, 1]",
        ),
        (
            {"test": {"tasks": 6, "query_shots": 4, "steps": [0], "support_shots": 2}},
            "in 'test.support_shots': expected 1, found 2",
        ),
        (
            {"test": {"tasks": 6, "query_shots": 4, "steps": [0], "transductive": False}},
            "in 'test.transductive': expected true, found false",
        ),
        ({"tasks": {"kind": "digits", "support_shots": 9, "query_shots": 2}}, "unknown key 'query"),
        (
            {"form": {"kind": "reptile"}},
            "multi-task for digits tasks, and for no others, found the",
        ),
        ({"tasks": {"kind": "sine", "support_shots": 9}}, "found the form multi-task for sine"),
        ({"model": {"kind": "conv4"}}, "in 'model': a conv4 model needs drawings of 784 numbers"),
        (
            {
                "model": {"kind": "mlp", "hidden": [5], "batch_norm": True},
                "tasks": {"kind": "digits", "support_shots": 1},
            },
            "in 'tasks.support_shots': batch_norm needs batches of two or more",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    write_digits: WriteStudy, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(StudyError, match=re.escape(words)) as caught:
        load(str(write_digits(**changes)))
    assert "\n" not in str(caught.value)


def test_an_inherited_inner_loop_is_left_out_by_null(
    write_digits: WriteStudy, tmp_path: Path
) -> None:
    quick = {"tuning": {"tasks": 6}, "test": {"tasks": 6}}
    changes = yaml.safe_load(write_digits(inner=None, quick=quick).read_text())
    changes["extends"] = "sine"
    path = tmp_path / "extending.yaml"
    path.write_text(yaml.safe_dump(changes))
    with pytest.raises(StudyError, match=r"'test.support_shots', .*: expected 1, found 10"):
        load(str(path))
    changes["test"] = changes["test"] | {"support_shots": 1}
    path.write_text(yaml.safe_dump(changes))
    assert load(str(path)).inner is None


@pytest.mark.slow
def test_without_scikit_learn_the_study_is_read_and_its_run_refused_with_the_command(
    write_digits: WriteStudy, tmp_path: Path
) -> None:
    program = (
        "import sys\n"
        "from gradagree_opt.ablation.study.loading import load\n"
        "from gradagree_opt.ablation.training.problem import build_problem\n"
        f"study = load({str(write_digits())!r})\n"
        "assert 'sklearn' not in sys.modules\n"
        "sys.modules['sklearn'] = None\n"
        "build_problem(study, None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].endswith(
        "StudyError: the tasks of pairs of digits: expected scikit-learn>=1.4.2, found none; "
        'install it with: pip install "scikit-learn>=1.4.2"'
    )
