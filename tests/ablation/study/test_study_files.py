"""Study files: what is read, and read back."""

import json
from pathlib import Path

import pytest

from gradagree_opt.ablation.report.artefacts import write_config
from gradagree_opt.ablation.runs.store import read_config
from gradagree_opt.ablation.study.loading import load, merge, shipped
from gradagree_opt.ablation.study.study import Study

from .conftest import SHIPPED, edited


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_study_is_valid_and_named_as_its_file(name: str, quick: bool) -> None:
    assert list(shipped()) == SHIPPED
    assert load(name, quick=quick).name == name + ("-quick" if quick else "")


@pytest.mark.parametrize("name", shipped())
def test_full_studies_have_five_seeds_and_as_many_test_tasks_as_the_field(name: str) -> None:
    study = load(name)
    assert len(study.seeds) >= 5
    assert study.test.tasks * (1 if study.adapts else study.test.query_shots) >= 600


def test_full_sine_studies_have_the_papers_test() -> None:
    for name in ("sine", "sine-maml"):
        study = load(name)
        assert (study.test.tasks, study.test.support_shots) == (1000, 10)
        assert study.test.steps == [0, 1, 5, 10, 32]


def test_quick_replaces_only_the_keys_it_names(study_file: Path, study: Study) -> None:
    quick = load(str(study_file), quick=True)
    assert (quick.iterations, quick.tuning.tasks, quick.name) == (3, 5, "tiny-quick")
    unchanged = {"name", "iterations", "tuning", "quick"}
    assert quick.model_dump(exclude=unchanged) == study.model_dump(exclude=unchanged)
    assert quick.tuning.steps == study.tuning.steps


def test_merge_goes_into_mappings_and_replaces_lists() -> None:
    document = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert merge(document, {"a": {"c": [9]}, "e": 4}) == {"a": {"b": 1, "c": [9]}, "d": 3, "e": 4}
    assert document == {"a": {"b": 1, "c": [1, 2]}, "d": 3}


def test_a_resolved_study_survives_json_and_back(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"study": study.model_dump(mode="json"), "other": 1}, indent=2))
    assert load(str(path)) == study


def test_a_number_in_exponent_form_is_a_number(study_file: Path) -> None:
    edited(study_file, "lr: 0.02", "lr: 2e-2")
    edited(study_file, "negative: clip", "temperature: 1e-1")
    study = load(str(study_file))
    assert study.inner.lr == 0.02
    assert study.methods[1].options == {"temperature": 0.1}


@pytest.mark.parametrize(
    "character", ["\x7f", "\x80", "\x85", "\u2028", "\ufeff", "\xfc", "\U0001f600"]
)
def test_a_name_is_read_back_from_the_configuration_as_it_is(
    study: Study, tmp_path: Path, character: str
) -> None:
    name = f"a{character} b"
    methods = [study.methods[0], study.methods[1].model_copy(update={"name": name})]
    study = study.model_copy(update={"methods": methods, "title": name})
    written = write_config(tmp_path, study, ["gradagree", name], None, [None])
    assert json.loads((tmp_path / "config.json").read_bytes())["command"] == ["gradagree", name]
    assert load(str(tmp_path / "config.json")) == study
    assert read_config(tmp_path) == written
