"""Study files: what every mistake in one is answered with."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load

from ..conftest import WriteStudy
from .conftest import SHIPPED, edited

WHOLE = {"lr": 0.02, "steps": 2}
TEST = {"tasks": 12, "support_shots": 5, "query_shots": 7, "steps": [0, 1, 2]}
MEAN = "{name: mean, aggregator: mean"


def corruption(keys: str) -> tuple[str, str]:
    form = "form: {kind: reptile}\n"
    return form, f"{form}corruption: {{{keys}}}\n"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("  steps: 2\n", "  stepps: 2\n", 8, "unknown key 'stepps'; did you mean 'steps'?"),
        ("  steps: 2\n", "", 6, "the key 'steps' is missing"),
        ("  batch_size: 5", "  batchsize: 5", 9, "unknown key 'batchsize'"),
        ("meta_batch: 3", "meta_batch: three", 12, "integer"),
        ("meta_batch: 3", "meta_batch: 0", 12, "greater than 0, found 0"),
        ("iterations: 5", "iterations: [1]", 11, "integer"),
        ("hidden: [8]", "hidden: [8, -1]", 4, "found -1"),
        ("activation: tanh", "activation: gelu", 4, "'relu' or 'tanh', found \"gelu\""),
        ("kind: sine,", "kind: grouped, dataset: Loblolly,", 3, "'Spruce'"),
        (*corruption("kind: noise, fraction: 0.3"), 6, "'shuffled_labels'"),
        ("  lr: 0.02\n", "  lr: 1e300\n", 7, "found 1e+300"),
        (*corruption("kind: flipped, fraction: 0.5, scale: 1e300"), 6, "found 1e+300"),
        (
            *corruption("kind: outlier_scale, fraction: 0.5, scale: -1e39"),
            6,
            "found -1e+39",
        ),
        (*corruption("kind: shuffled_labels, fraction: 0"), 6, "greater than 0, found 0"),
        (*corruption("kind: shuffled_labels, fraction: []"), 6, "at least 1 in the list, found 0"),
        (
            *corruption("kind: shuffled_labels, fraction: [0, 2]"),
            6,
            "less than or equal to 1, found 2",
        ),
        (*corruption("kind: shuffled_labels, fraction: [0.5, 0]"), 6, "[0.5, 0.0] do not rise"),
        (*corruption("kind: shuffled_labels, fraction: 0.3, scale: 2"), 6, "'scale' goes with"),
        (*corruption("kind: label_noise, fraction: 1"), 6, "'label_noise' needs the key 'scale'"),
        (
            *corruption("kind: label_noise, fraction: 1, scale: 0"),
            6,
            "label_noise needs a scale above 0",
        ),
        (*corruption("kind: flipped, fraction: 1"), 6, "'flipped' needs the key 'scale'"),
        (*corruption("kind: flipped, fraction: 1, scale: -1"), 6, "scale above 0, found -1"),
        (
            *corruption("kind: foreign, fraction: 1, foreign: lines, scale: 2"),
            6,
            "'scale' goes with kind 'label_noise' or 'outlier_scale' or 'flipped'",
        ),
        (*corruption("kind: foreign, fraction: 0.3"), 6, "needs the key 'foreign'"),
        (
            *corruption("kind: foreign, fraction: 0.3, foreign: circles"),
            6,
            "'lines', 'fast_sines', 'sleepstudy', ",
        ),
        ("form: {kind: reptile}", "form: {kind: repitle}", 5, "'reptile', 'maml', 'anil'"),
        ("form: {kind: reptile}", "form: {kin: reptile}", 5, "the key 'kind' is missing"),
        ("form: {kind: reptile}", "form: reptile", 5, 'keys with their values, found "reptile"'),
        (
            "form: {kind: reptile}",
            "form: {kind: reptile, steps: 1}",
            5,
            "unknown key 'steps'; there are kind",
        ),
        ("    aggregator: gradient_agreement", "    aggregator: agree", 19, "unknown aggregator"),
        ("      negative: clip", "      negativ: clip", 21, "unknown option 'negativ'"),
        ("      negative: clip", "      negative: clap", 20, "found 'clap'"),
        ("      negative: clip", "      negative: 1", 21, "a word for 'negative', found 1.0"),
        ("      negative: clip", "      temperature: hot", 21, "a number for 'temperature', found"),
        ("      negative: clip", "      temperature: yes", 21, "a number for 'temperature', found"),
        (
            "      negative: clip",
            "      include_self: 'no'",
            21,
            "true or false for 'include_self'",
        ),
        (
            "      negative: clip",
            "      match_norm: 1",
            21,
            "a word, an aggregator or null for 'match_norm'",
        ),
        ("iterations: 5", "iterations: true", 11, "integer"),
        ("rates: [0.25, 0.5]", "rates: [0.25, true]", 10, "number"),
        ("seeds: [3, 5]", "seeds: [3, true]", 13, "integer"),
        ("{name: mean, aggregator: mean}", "{name: agreement, aggregator: mean}", 16, "once"),
        ("baseline: mean", "baseline: median", 23, "'median'"),
        ("seeds: [3, 5]", "seeds: [3, 3]", 13, "3 is given more than once"),
        ("rates: [0.25, 0.5]", "rates: [0.25, 25e-2]", 10, "0.25 is given more than once"),
        ("rates: [0.25, 0.5]", "rates: [0.25, .inf]", 10, "a finite number"),
        ("meta_batch: 3", "meta_batch: 3\nmeta_batch: 4", 12, "'meta_batch' is given more than"),
        ("      negative: clip", "      nonfinite: raise", 21, "'raise' would end the study"),
        ("title: Tiny sine", "title: |\n  Tiny\n  sine", 2, "pattern"),
        (
            "kind: sine, support_shots: 10}",
            "kind: grouped, dataset: Milk, support_shots: 10}\n"
            + corruption("kind: foreign, fraction: 0.3, foreign: Milk")[1].partition("\n")[2],
            4,
            "not foreign",
        ),
        ("tuning: {seeds: 1,", "tuning: {seeds: 3,", 14, "more than the study's 2 seeds"),
        ("tuning: {seeds: 1,", "tuning: {seeds: [7, 5],", 14, "none of the study's seeds, found 5"),
        ("tuning: {seeds: 1,", "tuning: {seeds: [7, 7],", 14, "7 is given more than once"),
        ("tuning: {seeds: 1,", "tuning: {seeds: [],", 14, "at least 1 in the list, found 0"),
        ("0.5], schedule", "0.5], extend: -1, schedule", 10, "found -1"),
        ("[0.25, 0.5], schedule", "[1], extend: 1, schedule", 10, "two rates or more to extend"),
        (MEAN, f"{MEAN}, rates: [1.0]", 17, "as many rates as outer.rates has, 2, found 1; give"),
        (MEAN, f"{MEAN}, rates: [1.0, 1.0]", 17, "1.0 is given more than once"),
        (MEAN, f"{MEAN}, rates: [1.0, .inf]", 17, "a finite number"),
        (MEAN, f"{MEAN}, outer: rmsprop", 17, "'sgd', 'momentum' or 'adam', found \"rmsprop\""),
        ("steps: [0, 1, 2]}", "steps: [0, 2, 1]}", 15, "do not rise"),
        ("steps: [0, 1, 2]}", "steps: [0, 2]}", 14, "not among"),
        ("support_shots: 5, ", "", 15, "in 'test': the key 'support_shots' is missing"),
        ("inner:\n  lr: 0.02\n  steps: 2\n  batch_size: 5\n", "", 1, "the key 'inner' is missing"),
        ("  batch_size: 5", "  batch_size: 4", 9, "4 does not divide the 10"),
        ("kind: mlp, hidden: [8], activation: tanh", "kind: conv4", 4, "needs drawings"),
        ("hidden: [8]", "hidden: [8], network: finn", 4, "unknown key 'network'"),
        ("  iterations: 3", "  iteration: 6", 25, "unknown key 'iteration'"),
        ("  tuning: {tasks: 5}", "  tuning: {tasks: many}", 26, "integer"),
        ("  tuning: {tasks: 5}", "  tuning: {seeds: 9}", 26, "more than the study's 2 seeds"),
        (
            "  iterations: 3",
            f"  outer: {{rates: [1]}}\n  methods: [{MEAN}, rates: [1, 2]}}]",
            26,
            "outer.rates has, 1, found 2; give every method as many, under --quick",
        ),
        ("  iterations: 3", "  name: other", 25, "cannot rename"),
        ("name: tiny", "name: ../tiny", 1, "pattern"),
        ("inner:\n", "inner: {\n", 8, "not YAML"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_a_mistake_is_one_sentence_naming_file_and_line(
    study_file: Path, old: str, new: str, line: int, words: str
) -> None:
    edited(study_file, old, new)
    with pytest.raises(StudyError) as caught:
        load(str(study_file))
    message = str(caught.value)
    assert message.startswith(str(study_file))
    assert f", line {line}" in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("inner.batch_size", {"inner": {"lr": 0.02, "steps": 2, "batch_size": 1}}),
        ("tasks.support_shots", {"tasks": {"kind": "sine", "support_shots": 1}, "inner": WHOLE}),
        ("tasks", {"form": {"kind": "maml"}}),  # whose query example is one if it is not given
        ("test.support_shots", {"test": {**TEST, "support_shots": 1}}),
        ("test.query_shots", {"test": {**TEST, "query_shots": 1}}),
        (None, {"test": {**TEST, "query_shots": 1, "transductive": False}}),
        (None, {}),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_batch_norm_needs_two_examples_in_every_batch(
    write_study: WriteStudy, place: str | None, changes: dict[str, Any]
) -> None:
    path = str(write_study(model={"kind": "mlp", "hidden": [8], "batch_norm": True}, **changes))
    if place is None:
        assert load(path).model.kind == "mlp"
        return
    with pytest.raises(StudyError, match=f"in '{place}': batch_norm needs batches of two or more"):
        load(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected the keys of a study"),
        (b"- a\n- b\n", "expected the keys of a study"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"name: \x00", "not YAML"),
        (b"title: 2024-02-30", "line 1: not YAML: '2024-02-30' is no timestamp"),
        (b"a: 1\nb: !!timestamp 5", "line 2: not YAML: '5' is no timestamp"),
        (b"a: !!bool maybe", "'maybe' is no bool"),
        (b"a: !!int ''", "'' is no int"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"quick: &a {quick: *a}", "the key 'name' is missing"),
        (b'extends: "a\\0b"', r'found "a\\u0000b"'),
        (b'extends: "\\ud800"', r'found "\\ud800"'),
        (b"extends: &a [*a]", r"found \[\[\[.*\.\.\.\]"),
        (b"extends: {2024-02-03: 1}", "found {datetime.date"),
        (b"a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_file_that_is_no_study_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "no-study.yaml"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=words) as caught:
        load(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_quick_in_itself_is_named(study_file: Path) -> None:
    text = study_file.read_text()
    study_file.write_text(text[: text.index("quick:")] + "quick: &quick {quick: *quick}\n")
    with pytest.raises(StudyError, match="nested too deeply"):
        load(str(study_file))


@pytest.mark.parametrize("character", ["\n", "\x1b", "\x85", "\u2028"])
def test_whatever_a_key_or_a_kind_is_called_it_is_told_in_one_line(
    study_file: Path, character: str
) -> None:
    edited(study_file, "kind: reptile", f"kind: {json.dumps(f'rep{character}tile')}")
    with pytest.raises(StudyError, match="'reptile'") as caught:
        load(str(study_file))
    assert str(caught.value).isprintable() and ascii(character)[1:-1] in str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest_one_or_all() -> None:
    with pytest.raises(StudyError, match="found \"sin\"; did you mean 'sine'"):
        load("sin")
    with pytest.raises(StudyError, match=f'found "x"; there are {", ".join(SHIPPED)}$'):
        load("x")


@pytest.mark.parametrize("text", ["hidden: " + 9999 * "x", f"hidden: [[{9999 * '1, '}]]"])
def test_of_a_long_value_the_beginning_is_told(study_file: Path, text: str) -> None:
    with pytest.raises(StudyError) as caught:
        load(str(edited(study_file, "hidden: [8]", text)))
    assert text[8:100].strip("[]") in str(caught.value)
    assert len(str(caught.value)) < 500


def test_of_a_text_that_is_no_study_the_beginning_is_told(tmp_path: Path) -> None:
    path = tmp_path / "novel.yaml"
    path.write_text("It was a dark night, and " * 1000)
    with pytest.raises(StudyError, match="the keys of a study, found 'It was") as caught:
        load(str(path))
    assert len(str(caught.value)) < 500


def test_a_folder_is_no_study_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"is a folder; give a study file, as .*config\.json$"):
        load(str(tmp_path))


def test_quick_without_a_quick_section_is_refused(study_file: Path) -> None:
    text = study_file.read_text()
    study_file.write_text(text[: text.index("quick:")])
    with pytest.raises(StudyError, match="--quick needs a 'quick' section"):
        load(str(study_file), quick=True)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (sum, "expected what a study file may say .*, found <built-in function sum>"),
        ("my_file.network", "expected module:name, .*, found 'my_file.network'"),
        ("my_file.py:network", "expected module:name, .*, found 'my_file.py:network'"),
    ],
)
def test_a_network_of_ones_own_that_is_named_otherwise_is_found_by_its_keys(
    study_file: Path, make: object, words: str
) -> None:
    given = yaml.safe_load(study_file.read_text()) | {"model": {"kind": "own", "make": make}}
    with pytest.raises(StudyError, match=f"^the study that is given in 'model.make': {words}"):
        load(given)
