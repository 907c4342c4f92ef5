"""Keys: what of a run's study tells its record from others, and what does not."""

import hashlib
from typing import Any, get_args

import pytest

from gradagree_opt.ablation.runs.sweep import final_runs, tuning_runs
from gradagree_opt.ablation.section import Optimizer
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.sections import CorruptionSection, MAMLForm, MetaSGDForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import Run

RUN = Run(method=Method(name="mean", aggregator="mean"), rate=0.5, seed=3)
CORRUPTION = CorruptionSection(kind="shuffled_labels", fraction=0.3)


@pytest.mark.parametrize(
    ("name", "quick", "digest"),
    [
        ("sine", False, "b8de72c3a06402f08042"),
        ("sine", True, "5fbb3a1726e65bb6b88f"),
        ("sine-maml", False, "9ab9d0764e55a858f0d5"),
        ("sine-maml", True, "fabeba9134edfbb2c72a"),
        ("omniglot-5way-1shot", False, "cb1206b3c4cb6d19e6f6"),
        ("omniglot-5way-1shot", True, "021fd0a36747fffb6873"),
    ],
)
def test_the_keys_of_the_shipped_studies_are_those_of_the_runs_recorded_so_far(
    name: str, quick: bool, digest: str
) -> None:
    study = load(name, quick=quick)
    rates = {method.name: study.outer.rates[1] for method in study.methods}
    keys = [run.key(study, None) for run in tuning_runs(study) + final_runs(study, rates)]
    assert hashlib.sha256("".join(keys).encode()).hexdigest()[:20] == digest


def test_a_study_that_decides_about_compilation_has_the_keys_of_one_that_does_not_compile(
    study: Study,
) -> None:
    assert study.compile == "auto"
    assert RUN.key(study, None) == RUN.key(study.model_copy(update={"compile": False}), None)


def test_what_studies_of_omniglot_may_say_since_has_no_part_in_their_keys_until_they_say_it() -> (
    None
):
    study = load("omniglot-5way-1shot")
    changes: list[dict[str, Any]] = [{}, {"split": "background"}, {"rotations": True}]
    keys = {
        RUN.key(study.model_copy(update={"tasks": study.tasks.model_copy(update=change)}), "digest")
        for change in changes
    }
    assert len(keys) == 3 and RUN.key(study, "digest") in keys


def test_what_models_may_say_since_has_no_part_in_their_keys_until_it_is_another_model(
    study: Study,
) -> None:
    def key(study: Study, **changes: object) -> str:
        model = study.model.model_copy(update=changes)
        return RUN.key(study.model_copy(update={"model": model}), "digest")

    for name, usual, other in (
        ("omniglot-5way-1shot", "nichol", "finn"),
        ("mini-imagenet-5way-1shot", "finn", "nichol"),
    ):
        shipped = load(name)
        assert key(shipped) == key(shipped, network=usual) != key(shipped, network=other)
    assert key(study) == key(study, batch_norm=False) != key(study, batch_norm=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"title": "other"},
        {"seeds": [3, 5, 7, 9]},
        {"baseline": "agreement"},
        {"methods": [Method(name="sum", aggregator="sum")]},
    ],
)
def test_the_key_does_not_depend_on_what_does_not_touch_the_run(
    study: Study, changes: dict[str, Any]
) -> None:
    assert RUN.key(study.model_copy(update=changes), None) == RUN.key(study, None)


def test_the_key_does_not_depend_on_the_other_rates_nor_on_the_methods_name(study: Study) -> None:
    outer = study.outer.model_copy(update={"rates": [0.5, 8.0]})
    tuning = study.tuning.model_copy(update={"seeds": 2})
    wider = study.model_copy(update={"outer": outer, "tuning": tuning})
    assert RUN.key(wider, None) == RUN.key(study, None)
    renamed = Method(name="average", aggregator="mean", rates=[0.5, 9.0])
    assert RUN.model_copy(update={"method": renamed}).key(study, None) == RUN.key(study, None)


def test_the_key_depends_on_the_optimizer_that_steps_whoever_names_it(study: Study) -> None:
    def key(own: Optimizer | None, of_all: Optimizer) -> str:
        outer = study.outer.model_copy(update={"optimizer": of_all})
        run = RUN.model_copy(update={"method": RUN.method.model_copy(update={"outer": own})})
        return run.key(study.model_copy(update={"outer": outer}), None)

    assert key("sgd", "sgd") == key(None, "sgd") == key("sgd", "adam")
    assert len({key(own, "sgd") for own in get_args(Optimizer)}) == 3


def test_the_key_depends_on_everything_that_touches_the_run(study: Study) -> None:
    def changed(part: str, **changes: object) -> Study:
        return study.model_copy(update={part: getattr(study, part).model_copy(update=changes)})

    other_options = Method(name="mean", aggregator="mean", options={"match_norm": "agreement"})
    keys = [
        RUN.key(study, None),
        RUN.key(study, "digest of some data"),
        RUN.model_copy(update={"rate": 0.25}).key(study, None),
        RUN.model_copy(update={"seed": 4}).key(study, None),
        RUN.model_copy(update={"method": other_options}).key(study, None),
        RUN.key(changed("tasks", ranges="finn"), None),
        RUN.key(changed("model", hidden=[9]), None),
        RUN.key(changed("inner", lr=0.1), None),
        RUN.key(changed("outer", schedule="constant"), None),
        RUN.key(changed("outer", optimizer="adam"), None),
        RUN.key(changed("tuning", tasks=11), None),
        RUN.key(changed("test", tasks=13), None),
        RUN.key(changed("test", transductive=False), None),
        RUN.key(study.model_copy(update={"form": MAMLForm(kind="maml")}), None),
        RUN.key(study.model_copy(update={"form": MAMLForm(kind="anil")}), None),
        RUN.key(study.model_copy(update={"form": MetaSGDForm(kind="meta-sgd")}), None),
        RUN.key(study.model_copy(update={"iterations": 13}), None),
        RUN.key(study.model_copy(update={"meta_batch": 4}), None),
        RUN.key(study.model_copy(update={"compile": True}), None),
        RUN.key(study.model_copy(update={"corruption": CORRUPTION}), None),
        RUN.key(
            study.model_copy(
                update={"corruption": CORRUPTION.model_copy(update={"fraction": 0.2})}
            ),
            None,
        ),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("name", "quick", "data", "rate", "key"),
    [
        ("sine", False, None, 0.25, "f3875ea12604ffee0f09"),
        ("sine-maml", False, None, 0.001, "21f8d332de56357c22c9"),
        ("omniglot-5way-1shot", False, "digest", 0.25, "a20d6ef2a0ad37ec1f5f"),
        ("mini-imagenet-5way-1shot", False, "digest", 0.25, "fa0a871eb0a3655a1be6"),
    ],
)
def test_runs_recorded_before_a_study_could_have_more_keys_are_found_again(
    name: str, quick: bool, data: str | None, rate: float, key: str
) -> None:
    run = Run(method=Method(name="mean", aggregator="mean"), rate=rate, seed=0)
    assert run.key(load(name, quick=quick), data) == key
