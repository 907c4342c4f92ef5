"""Study files: what is read, and what every mistake in one is answered with."""

import json
from pathlib import Path

import pytest

from gradagree_opt.ablation.loading import load, merge, shipped
from gradagree_opt.ablation.study import Study, StudyError

SHIPPED = [
    "grouped",
    "mini-imagenet-5way-1shot",
    "mini-imagenet-5way-5shot",
    "omniglot-20way-1shot",
    "omniglot-20way-5shot",
    "omniglot-5way-1shot",
    "omniglot-5way-5shot",
    "sine",
    "sine-aggregators",
    "sine-corrupted",
    "sine-maml",
    "sine-outliers",
]


def corruption(keys: str) -> tuple[str, str]:
    form = "form: {kind: reptile}\n"
    return form, f"{form}corruption: {{{keys}}}\n"


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_study_is_valid_and_named_as_its_file(name: str, quick: bool) -> None:
    assert list(shipped()) == SHIPPED
    assert load(name, quick=quick).name == name + ("-quick" if quick else "")


@pytest.mark.parametrize("name", shipped())
def test_full_studies_have_five_seeds_and_as_many_test_tasks_as_the_field(name: str) -> None:
    study = load(name)
    assert len(study.seeds) >= 5
    assert study.test.tasks >= 600


def test_full_sine_studies_have_the_papers_test() -> None:
    for name in ("sine", "sine-maml"):
        study = load(name)
        assert (study.test.tasks, study.test.support_shots) == (1000, 10)
        assert study.test.steps == [0, 1, 5, 10, 32]


def test_quick_replaces_only_the_keys_it_names(study_file: Path, study: Study) -> None:
    quick = load(str(study_file), quick=True)
    assert (quick.iterations, quick.tuning.tasks, quick.name) == (6, 5, "tiny-quick")
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
    ("old", "new", "line", "words"),
    [
        ("  steps: 2\n", "  stepps: 2\n", 8, "unknown key 'stepps'"),
        ("  steps: 2\n", "", 6, "the key 'steps' is missing"),
        ("  batch_size: 5", "  batchsize: 5", 9, "unknown key 'batchsize'"),
        ("meta_batch: 3", "meta_batch: three", 12, "integer"),
        ("meta_batch: 3", "meta_batch: 0", 12, "greater than 0, found 0"),
        ("iterations: 12", "iterations: [1]", 11, "integer"),
        ("hidden: [8]", "hidden: [8, -1]", 4, "found -1"),
        ("activation: tanh", "activation: gelu", 4, "'relu' or 'tanh', found \"gelu\""),
        ("kind: sine,", "kind: grouped, dataset: Loblolly,", 3, "'Spruce'"),
        (*corruption("kind: noise, fraction: 0.3"), 6, "'shuffled_labels'"),
        (*corruption("kind: shuffled_labels, fraction: 0"), 6, "greater than 0, found 0"),
        (*corruption("kind: shuffled_labels, fraction: []"), 6, "at least 1 item"),
        (
            *corruption("kind: shuffled_labels, fraction: [0, 2]"),
            6,
            "less than or equal to 1, found 2",
        ),
        (*corruption("kind: shuffled_labels, fraction: [0.5, 0]"), 6, "[0.5, 0.0] do not rise"),
        (*corruption("kind: shuffled_labels, fraction: 0.3, scale: 2"), 6, "'scale' goes with"),
        (*corruption("kind: foreign, fraction: 0.3"), 6, "'foreign' goes with kind 'foreign'"),
        (*corruption("kind: foreign, fraction: 0.3, foreign: circles"), 6, "'lines'"),
        ("form: {kind: reptile}", "form: {kind: repitle}", 5, "'reptile'"),
        ("form: {kind: reptile}", "form: {kind: reptile, steps: 1}", 5, "unknown key 'steps'"),
        ("    aggregator: gradient_agreement", "    aggregator: agree", 19, "unknown aggregator"),
        ("      negative: clip", "      negativ: clip", 21, "unknown option 'negativ'"),
        ("      negative: clip", "      negative: clap", 20, "found 'clap'"),
        ("      negative: clip", "      temperature: hot", 20, "not supported"),
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
        ("steps: [0, 1, 2]}", "steps: [0, 2, 1]}", 15, "do not rise"),
        ("steps: [0, 1, 2]}", "steps: [0, 2]}", 14, "not among"),
        ("  batch_size: 5", "  batch_size: 4", 9, "4 does not divide the 10"),
        ("kind: mlp, hidden: [8], activation: tanh", "kind: conv4", 4, "needs drawings"),
        ("  iterations: 6", "  iteration: 6", 25, "unknown key 'iteration'"),
        ("  tuning: {tasks: 5}", "  tuning: {tasks: many}", 26, "integer"),
        ("  tuning: {tasks: 5}", "  tuning: {seeds: 9}", 26, "more than the study's 2 seeds"),
        ("  iterations: 6", "  name: other", 25, "cannot rename"),
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
    ("content", "words"),
    [
        (b"", "expected the keys of a study"),
        (b"- a\n- b\n", "expected the keys of a study"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"name: \x00", "not YAML"),
        (b"title: 2024-02-30", "not YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_file_that_is_no_study_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "no-study.yaml"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=words) as caught:
        load(str(path))
    assert str(path) in str(caught.value)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(StudyError, match=f"{', '.join(SHIPPED)}, found 'sin'"):
        load("sin")


def test_a_folder_is_no_study_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read"):
        load(str(tmp_path))


def test_quick_without_a_quick_section_is_refused(study_file: Path) -> None:
    text = study_file.read_text()
    study_file.write_text(text[: text.index("quick:")])
    with pytest.raises(StudyError, match="--quick needs a 'quick' section"):
        load(str(study_file), quick=True)
