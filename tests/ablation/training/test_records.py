"""Records: what a run's key depends on, and what becomes of files that were cut off."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from gradagree_opt.ablation.runs.sweep import final_runs, tuning_runs
from gradagree_opt.ablation.section import Optimizer
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.sections import CorruptionSection, MAMLForm, MetaSGDForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import (
    CurvePoint,
    DamagedRecordError,
    Run,
    RunRecord,
    Store,
    archive,
    write_atomically,
)
from gradagree_opt.replacing import replacing

RUN = Run(method=Method(name="mean", aggregator="mean"), rate=0.5, seed=3)
RECORD = RunRecord(
    run=RUN,
    validation=0.1,
    test={0: 4.0, 1: float("inf")},
    curve=[
        CurvePoint(iteration=0, loss=float("nan"), diagnostics={}),
        CurvePoint(iteration=6, loss=1 / 3, diagnostics={"cancellation": 1 / 7}),
    ],
    seconds=1.0,
)
CORRUPTION = CorruptionSection(kind="shuffled_labels", fraction=0.3)
STUDY = load("sine")
STUDY = STUDY.model_copy(update={"test": STUDY.test.model_copy(update={"steps": [0, 1]})})
KEY = RUN.key(STUDY, None)
PARAMS = {"weight": torch.tensor([[1 / 3, -2.0]]), "bias": torch.tensor(0.25)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.write(KEY, RECORD, archive(PARAMS))
    return store


def lengths(path: Path) -> Iterator[int]:
    """Every seventh length that a file may be cut off at, while it is, and in the end the file."""
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        yield length
    path.write_bytes(whole)


def test_a_record_and_its_parameters_are_read_as_they_were_written(store: Store) -> None:
    read = store.read(RUN, STUDY, None)
    assert read is not None
    assert repr(read) == repr(RECORD)  # NaN and infinity included
    params = store.params(KEY)
    assert params.keys() == PARAMS.keys()
    assert all(torch.equal(params[name], PARAMS[name]) for name in PARAMS)


def test_a_run_that_is_not_there_is_none(store: Store) -> None:
    assert store.read(RUN, STUDY, "other data") is None


def test_a_record_cut_off_anywhere_is_damaged_never_wrong(store: Store) -> None:
    for _ in lengths(store.folder / f"{KEY}.json"):
        with pytest.raises(DamagedRecordError, match=rf"{KEY}\.json is cut off"):
            store.read(RUN, STUDY, None)
    assert store.read(RUN, STUDY, None) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"validation": "NaN"},
        {"test": {"0": 4.0, "1": "NaN"}},
        {"test": {"0": 4.0}},
        {"test": {"0": 4.0, "1": 4.0, "5": 4.0}},
        {"curve": []},
        {"agreement": [[1.0], [1.0, 0.5]]},
        {"seconds": "NaN"},
        {"seconds": -1.0},
        {"run": RUN.model_copy(update={"rate": 0.25}).model_dump()},
        {"run": RUN.model_copy(update={"seed": 4}).model_dump()},
        {"run": Run(method=Method(name="mean", aggregator="sum"), rate=0.5, seed=3).model_dump()},
    ],
)
def test_a_record_that_is_whole_but_not_what_its_run_leaves_is_damaged(
    store: Store, changes: dict[str, Any]
) -> None:
    path = store.folder / f"{KEY}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DamagedRecordError, match=rf"{KEY}\.json is "):
        store.read(RUN, STUDY, None)


def test_a_record_is_found_by_a_method_renamed_or_with_rates_and_optimizer_of_its_own(
    store: Store,
) -> None:
    optimizer = STUDY.outer.optimizer
    method = Method(name="plain", aggregator="mean", rates=[0.5], outer=optimizer)
    run = Run(method=method, rate=0.5, seed=3)
    found = store.read(run, STUDY, None)
    assert found is not None and found.run == run and found.test == RECORD.test


def test_parameters_cut_off_anywhere_are_none_never_wrong(store: Store) -> None:
    for _ in lengths(store.folder / f"{KEY}.npz"):
        assert store.params(KEY) is None
    assert store.params(KEY) is not None


def test_parameters_with_a_flipped_byte_are_none_or_read_and_never_an_accident(
    store: Store,
) -> None:
    path = store.folder / f"{KEY}.npz"
    whole = path.read_bytes()
    damaged = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        damaged += store.params(KEY) is None
    assert damaged > len(whole) / 2


def test_a_record_stands_without_its_parameters(store: Store) -> None:
    (store.folder / f"{KEY}.npz").unlink()
    assert repr(store.read(RUN, STUDY, None)) == repr(RECORD)
    assert store.params(KEY) is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.md"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["table.md"]
    assert path.read_bytes() == b"old"


def test_two_that_write_one_file_at_once_share_nothing_though_their_process_numbers_are_equal(
    tmp_path: Path,
) -> None:
    path = tmp_path / "table.md"
    with replacing(path) as own:
        with replacing(path) as other:
            other.write_bytes(b"other host's")
            own.write_bytes(b"own")
        assert path.read_bytes() == b"other host's"
    assert path.read_bytes() == b"own"
    assert [file.name for file in tmp_path.iterdir()] == ["table.md"]


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
