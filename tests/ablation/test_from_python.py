"""A study from Python: as from the command, and as a mapping."""

import json
from pathlib import Path

import pytest

import gradagree_opt as ga
from gradagree_opt.ablation import ablate
from gradagree_opt.ablation.conduct import Results
from gradagree_opt.ablation.section import StudyError

from .conftest import WriteStudy


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("without_figures")
def test_from_python_as_from_the_command(write_study: WriteStudy, finished: Path) -> None:
    results = ablate(finished.parent / "tiny.yaml", out="out", jobs=1)
    assert isinstance(results, Results) and results.folder == Path("out")
    assert repr(results) == f"Results(folder={results.folder!r})"
    for name, table in (("results.csv", results.runs), ("table.csv", results.table)):
        assert Path("out", name).read_text() == table.to_csv(index=False)
    assert Path("out/results.csv").read_bytes() == (finished / "results.csv").read_bytes()
    given = json.loads(Path("out/config.json").read_text())["study"]
    assert ablate(given, out="out", jobs=1).runs.equals(results.runs)


@pytest.mark.usefixtures("without_figures")
def test_how_far_it_is_is_shown_where_that_is_asked_for(
    study_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for progress, shown in ((True, ["Tiny sine", " 100 %"]), (False, [])):
        ablate(study_file, out=str(progress), jobs=1, seeds=[3], iterations=1, progress=progress)
        printed = capsys.readouterr()
        assert printed.out == "" and bool(printed.err) is progress
        assert all(words in printed.err for words in shown)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iterations": 0}, "the study that is given in 'iterations': "),
        ({"extends": "sins"}, "expected a study file or a shipped study"),
        ({"methods": [{"name": "own", "aggregator": ga.Mean}]}, "what a study file may say"),
    ],
)
def test_a_mapping_that_is_no_study_is_refused(changes: dict[str, object], words: str) -> None:
    given = {"extends": "sine", "name": "given", "title": "Given"} | changes
    with pytest.raises(StudyError) as caught:
        ablate(given, out="out", jobs=1)
    assert words in str(caught.value) and "line" not in str(caught.value)
    assert not Path("out").exists()
