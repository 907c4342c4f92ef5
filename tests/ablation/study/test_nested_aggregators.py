"""Options of aggregators that are aggregators themselves."""

from typing import Any, Literal

import pytest
import torch

import gradagree_opt as ga
from gradagree_opt.ablation.report.citations import methods_text
from gradagree_opt.ablation.runs.store import Config
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import AGGREGATORS, Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.grouping import groups
from gradagree_opt.ablation.training.problem import build_problem
from gradagree_opt.ablation.training.run import Run, RunRecord
from gradagree_opt.ablation.training.training import train_runs

from ..conftest import WriteStudy

CLIPPED = {"aggregator": "gradient_agreement", "options": {"negative": "clip"}}


class Like(ga.Aggregator):
    """Weighs as another aggregator does."""

    def __init__(
        self, *, other: Literal["mean"] | ga.Aggregator | None = None, nonfinite: Any = "raise"
    ) -> None:
        other = ga.Mean() if other in (None, "mean") else other
        if isinstance(other, ga.NormShare):
            raise ValueError("expected weights that do not see norms")
        self.other = other
        super().__init__(other.weighting, scope=other.scope, nonfinite=nonfinite)


@pytest.fixture(autouse=True)
def like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGGREGATORS, "like", Like)


class Positional(Like):
    """The same, its one option positional."""

    def __init__(self, other: ga.Aggregator, /, *, nonfinite: Any = "raise") -> None:
        super().__init__(other=other, nonfinite=nonfinite)


def method_like(other: Any, name: str = "nested") -> Method:
    return Method(name=name, aggregator="like", options={"other": other})


def key(study: Study, method: Method) -> str:
    return Run(method=method, rate=0.5, seed=3).key(study, None)


def test_it_is_built_with_its_own_options_and_goes_on_where_a_batch_overflows() -> None:
    deeper = {"aggregator": "like", "options": {"other": CLIPPED}}
    outer = method_like(deeper).build(torch.Generator())
    assert isinstance(outer, Like) and isinstance(outer.other, Like)
    inner = outer.other.other
    assert isinstance(inner, ga.GradientAgreement)
    assert repr(inner) == repr(ga.GradientAgreement(negative="clip", nonfinite="propagate"))
    assert outer.nonfinite == outer.other.nonfinite == "propagate"


def test_an_option_may_be_positional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGGREGATORS, "positional", Positional)
    method = Method(name="x", aggregator="positional", options={"other": CLIPPED})
    built = method.build(torch.Generator())
    assert isinstance(built, Positional) and isinstance(built.other, ga.GradientAgreement)
    with pytest.raises(ValueError, match="the option 'other' is missing; positional has other"):
        Method(name="x", aggregator="positional")


@pytest.mark.usefixtures("without_type_checks")
def test_a_study_file_gives_one_that_trains_as_itself_and_is_read_back(
    write_study: WriteStudy,
) -> None:
    methods = [
        {"name": "mean", "aggregator": "mean"},
        {"name": "clipped", **CLIPPED},
        {"name": "nested", "aggregator": "like", "options": {"other": CLIPPED}},
    ]
    study = load(str(write_study(methods=methods)))
    assert Study.model_validate(study.model_dump()) == study
    problem = build_problem(study, None)
    (record, nested), (_, expected) = (
        train_runs(study, problem, [Run(method=method, rate=0.5, seed=3)], lambda _: None)[0]
        for method in study.methods[:0:-1]
    )
    torch.testing.assert_close(nested, expected)
    assert RunRecord.model_validate_json(record.model_dump_json()) == record
    assert len({key(study, method) for method in study.methods}) == 3
    assert key(study, study.methods[2]) == key(study, method_like(CLIPPED, "other name"))
    other = {"aggregator": "gradient_agreement", "options": {"negative": "keep"}}
    assert key(study, study.methods[2]) != key(study, method_like(other))


@pytest.mark.parametrize(
    ("other", "place", "words"),
    [
        ("{aggregator: agree}", "other.aggregator", "unknown aggregator 'agree'; there are mean"),
        ("{aggregator: mean, option: {}}", "other.option", "unknown key 'option'"),
        ("{options: {}}", "other", "the key 'aggregator' is missing"),
        (
            "{aggregator: mean, options: {match: 1}}",
            "other.options.match",
            "unknown option 'match'; mean has",
        ),
        (
            "{aggregator: gradient_agreement, options: {negative: 1}}",
            "other.options.negative",
            "a word for 'negative', found 1.0",
        ),
        (
            "{aggregator: mean, options: {nonfinite: raise}}",
            "other.options.nonfinite",
            "'raise' would end the study",
        ),
        ("{aggregator: norm_share}", None, "weights that do not see norms"),
        ("3", "other", "expected a word, an aggregator or null for 'other', found 3.0"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_a_mistake_in_one_is_one_sentence_naming_its_place(
    study_file: Any, other: str, place: str | None, words: str
) -> None:
    text = study_file.read_text()
    head, line, tail = text.partition("  - {name: mean, aggregator: mean}\n")
    method = f"  - name: nested\n    aggregator: like\n    options:\n      other: {other}\n"
    study_file.write_text(head + line + method + tail)
    with pytest.raises(StudyError) as caught:
        load(str(study_file))
    message = str(caught.value)
    number = (head + line).count("\n") + (4 if place else 3)
    where = "methods.1.options" + (f".{place}" if place else "")
    assert f", line {number} in {where!r}: " in message
    assert words in message and "\n" not in message


def test_an_option_that_takes_no_aggregator_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="expected a word for 'negative', found an aggregator"):
        Method(
            name="x", aggregator="gradient_agreement", options={"negative": {"aggregator": "mean"}}
        )


def test_a_method_with_a_part_of_torchjds_is_trained_alone() -> None:
    pytest.importorskip("torchjd", reason="torchjd is not installed")
    method = method_like({"aggregator": "torchjd.UPGrad"})
    assert method.of_torchjd and not method_like(CLIPPED).of_torchjd
    runs = [Run(method=method, rate=0.5, seed=seed) for seed in range(3)]
    assert [len(group) for group in groups(runs, 8)] == [1, 1, 1]


def test_the_methods_text_describes_it_and_cites_what_it_uses(study: Study) -> None:
    names = ("gradagree-opt", "torch", "numpy", "scipy", "pandas", "matplotlib")
    methods = [Method(name="mean", aggregator="mean"), method_like(CLIPPED)]
    config = Config(
        study=study.model_copy(update={"methods": methods}),
        command=[],
        data_sha256=None,
        python="3",
        machine="any",
        packages=dict.fromkeys(names, "1"),
    )
    text = methods_text(config)
    assert '"nested" (like, other = (Gradient Agreement, negative = clip)).' in text
    assert "[@eshratifar2018gradient]" in text
