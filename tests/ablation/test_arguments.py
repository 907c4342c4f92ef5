"""What ``ablate`` refuses it says by its arguments, and the command by its options."""

from pathlib import Path
from typing import Any

import pytest

from gradagree_opt.ablation import ablate
from gradagree_opt.ablation.section import StudyError
from gradagree_testing.command import gradagree

from .conftest import WriteStudy

REFUSED = {
    "seeds": {"seeds": [1, 1]},
    "iterations": {"iterations": 0},
    "quick": {"quick": True},
    "data": {"data": "nothing--there"},
    "out": {"out": "file"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_a_refused_argument_is_named_as_it_is_given(
    option: str, write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    study, given = write_study(quick=None), {"out": "out", **REFUSED[option]}
    with pytest.raises(StudyError) as caught:
        ablate(study, jobs=1, **given)
    words = [f"--{name}{_value(value)}" for name, value in given.items()]
    told = gradagree("ablate", study, *" ".join(words).split()).stderr
    assert f"--{option}" in told and f" --{option}" not in f" {caught.value}"
    expected = told.removeprefix("gradagree: ").rstrip()
    assert str(caught.value) == expected.replace(f"--{option}", option)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f" {','.join(map(str, value))}"
    return "" if value is True else f" {value}"
