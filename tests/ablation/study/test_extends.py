"""Studies that extend others: what they come to, and where a mistake in either is found."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load, merge
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.cli import app

CHILD = """\
extends: tiny.yaml
name: child
title: A child
inner: {lr: 0.5}
methods: [{name: mean, aggregator: mean}]
quick:
  tuning: {tasks: 3}
"""


@pytest.fixture
def child(study_file: Path) -> Path:
    """A study beside the tiny one that extends it."""
    path = study_file.with_name("child.yaml")
    path.write_text(CHILD)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(StudyError) as caught:
        load(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("quick", [False, True])
def test_a_study_is_the_other_one_with_its_own_keys_in_place(
    child: Path, study_file: Path, quick: bool
) -> None:
    keys = yaml.safe_load(study_file.read_text())
    keys |= {"name": "child", "title": "A child", "methods": [{"name": "mean"}]}
    keys["methods"][0]["aggregator"] = "mean"
    keys["inner"]["lr"] = 0.5
    keys["quick"]["tuning"]["tasks"] = 3
    written_out = child.with_name("written-out.yaml")
    written_out.write_text(yaml.safe_dump(keys))
    assert load(str(child), quick=quick) == load(str(written_out), quick=quick)


def test_a_study_is_extended_from_its_own_folder_and_over_several_files(
    child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    grandchild = tmp_path / "below/grandchild.yaml"
    grandchild.write_text("extends: ../child.yaml\nname: third\ntitle: Third\niterations: 7\n")
    expected = load(str(child)).model_copy(
        update={"name": "third", "title": "Third", "iterations": 7}
    )
    assert load("grandchild.yaml") == expected


def test_a_section_of_another_kind_is_replaced_whole(child: Path, study: Study) -> None:
    child.write_text(CHILD + "form: {kind: maml}\ntasks: {kind: sine, query_shots: 4}\n")
    assert load(str(child)).form.kind == "maml"
    assert load(str(child)).tasks == study.tasks.model_copy(update={"query_shots": 4})
    other = {"model": {"kind": "conv4"}}
    assert merge({"model": {"kind": "mlp", "hidden": [8]}}, other) == other


def test_name_and_title_are_not_inherited(child: Path) -> None:
    child.write_text(CHILD.replace("name: child\n", ""))
    assert refusal(child) == f"{child}, line 1: the key 'name' is missing"
    child.write_text(CHILD.replace("title: A child\n", ""))
    assert refusal(child) == f"{child}, line 1: the key 'title' is missing"


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("{lr: 0.5}", "{lr: -1}", "line 4 in 'inner.lr'", "greater than 0, found -1"),
        ("{lr: 0.5}", "{rate: 1}", "line 4 in 'inner.rate'", "unknown key 'rate'"),
        ("{lr: 0.5}", "{batch_size: 3}", "line 4 in 'inner.batch_size'", "3 does not divide"),
        ("aggregator: mean", "aggregator: me", "line 5 in 'methods.0.aggregator'", "unknown"),
        (", aggregator: mean", "", "line 5 in 'methods.0'", "'aggregator' is missing"),
        ("{tasks: 3}", "{seeds: 9}", "line 7 in 'tuning.seeds'", "more than the study's 2"),
        ("inner: {lr: 0.5}", "inner: 3", "line 4 in 'inner'", "found 3"),
        ("inner: {lr: 0.5}", "tasks: {kind: omniglot}", "line 4 in 'tasks'", "'support_shots'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_a_mistake_in_what_is_replaced_is_found_in_the_file_that_replaces_it(
    child: Path, old: str, new: str, place: str, words: str
) -> None:
    child.write_text(CHILD.replace(old, new, 1))
    message = refusal(child)
    assert message.startswith(f"{child}, {place}: ") and words in message


@pytest.mark.usefixtures("without_type_checks")
def test_a_mistake_in_what_is_inherited_is_found_in_the_file_that_is_extended(
    child: Path, study_file: Path
) -> None:
    text = study_file.read_text()
    study_file.write_text(text.replace("meta_batch: 3", "meta_batch: 0"))
    place = f"{study_file}, line 12 in 'meta_batch', extended by {child}: "
    assert refusal(child).startswith(place)
    study_file.write_text(text.replace("iterations: 3", "iteration: 3"))
    assert refusal(child).startswith(f"{study_file}, line 25 in 'iteration', extended by")
    study_file.write_text(text.replace("inner:\n", "inner: {\n"))
    assert re.match(rf"{study_file}, line \d+: not YAML", refusal(child))


@pytest.mark.parametrize(
    ("extended", "words"),
    [
        ("absent", 'expected a study file .*, found "absent"; there are .*, sine, .*'),
        ("3", "expected a study file .*, found 3; there are .*, sine, .*"),
        ("", "expected a study file .*, found null; there are .*, sine, .*"),
        ("child.yaml", "'child.yaml' extends this file; one of them has to be complete"),
    ],
)
def test_what_cannot_be_extended_is_named_with_its_line(
    child: Path, extended: str, words: str
) -> None:
    child.write_text(CHILD.replace("tiny.yaml", extended))
    assert re.fullmatch(rf"{child}, line 1 in 'extends': {words}", refusal(child))


def test_studies_that_extend_each_other_are_refused(child: Path) -> None:
    other = child.with_name("other.yaml")
    other.write_text(CHILD.replace("tiny.yaml", "child.yaml"))
    child.write_text(CHILD.replace("tiny.yaml", "other.yaml"))
    assert refusal(child).startswith(f"{other}, line 1 in 'extends': 'child.yaml' extends this")


@pytest.mark.usefixtures("without_figures")
def test_the_configuration_of_a_run_holds_the_resolved_study(child: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["ablate", str(child), "--quick", "--out", str(out), "--jobs", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    content = json.loads((out / "config.json").read_text())["study"]
    assert "extends" not in content
    assert Study.model_validate(content) == load(str(out / "config.json"))
    assert load(str(out / "config.json")) == load(str(child), quick=True)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("data", "way", "shots"),
    [
        ("omniglot", 5, 1),
        ("omniglot", 5, 5),
        ("omniglot", 20, 1),
        ("omniglot", 20, 5),
        ("mini-imagenet", 5, 1),
        ("mini-imagenet", 5, 5),
    ],
)
def test_every_column_of_the_papers_table_has_its_study(
    data: str, way: int, shots: int, quick: bool
) -> None:
    study = load(f"{data}-{way}way-{shots}shot", quick=quick)
    assert study.tasks.kind == data and f"{way}-way {shots}-shot" in study.title
    assert (study.way, study.test.support_shots) == (way, shots)
    assert study.methods == load(f"{data}-5way-1shot").methods
