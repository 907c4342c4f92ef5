"""Records: what becomes of files that were cut off, damaged, or left by another run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import Method
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
        {"colour": "of a later version"},
        {"run": RUN.model_copy(update={"rate": 0.25}).model_dump()},
        {"run": RUN.model_copy(update={"seed": 4}).model_dump()},
        {"run": RUN.model_dump() | {"colour": "of a later version"}},
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
