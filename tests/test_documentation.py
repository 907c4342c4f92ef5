"""The documentation names what there is: public names, options, diagnostics, keys of a study."""

import inspect
import re
import runpy
from pathlib import Path
from typing import get_args, get_origin

import pandas as pd
import pytest
from pydantic import BaseModel

import gradagree_opt as ga
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.methods import AGGREGATORS
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import CurvePoint, RunRecord

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *DOCS.rglob("*.md")]
STUDIES = [
    (page.stem, body)
    for page in PAGES
    for body in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
]


def code_words(page: str) -> set[str]:
    """The words of a page that stand in its code spans."""
    return set(re.findall(r"[\w-]+", " ".join(re.findall("`([^`\n]+)`", page))))


def field_names(model: type[BaseModel]) -> set[str]:
    """The keys of a section, and of those in it."""
    names = set(model.model_fields)
    pending = [field.annotation for field in model.model_fields.values()]
    while pending:
        hint = pending.pop()
        plain = inspect.isclass(hint) and get_origin(hint) is None  # Python 3.10 calls list[…] one
        if plain and issubclass(hint, BaseModel) and hint is not model:
            names |= field_names(hint)
        pending += get_args(hint)
    return names


@pytest.mark.parametrize("name", ga.__all__)
def test_every_public_name_is_on_a_page(name: str) -> None:
    assert any(re.search(rf"\b{name}\b", page.read_text("utf-8")) for page in PAGES)


def test_options_stand_with_their_defaults() -> None:
    page = (DOCS / "aggregators.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)`", page, re.MULTILINE))
    parameters = inspect.signature(ga.GradientAgreement).parameters.values()
    assert rows == {p.name: repr(p.default).replace("'", '"') for p in parameters}


def test_every_diagnostic_is_explained() -> None:
    assert set(ga.Diagnostics._fields) <= code_words((DOCS / "aggregators.md").read_text("utf-8"))


def test_every_key_and_aggregator_of_a_study_is_explained() -> None:
    page = (DOCS / "studies.md").read_text("utf-8")
    assert (field_names(Study) | set(AGGREGATORS)) - code_words(page) == set()


@pytest.mark.parametrize("body", [body for _, body in STUDIES], ids=[page for page, _ in STUDIES])
def test_studies_on_the_pages_load(body: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(body, "utf-8")
    study = load(str(tmp_path / "study.yaml"))
    assert study.name in body


def test_the_page_shows_the_weighting_that_the_contract_is_checked_on() -> None:
    [shown] = re.findall(
        r"```python\n((?!>>>).*?)```", (DOCS / "own-weighting.md").read_text("utf-8"), re.DOTALL
    )
    assert shown in (DOCS / "own_weighting.py").read_text("utf-8")


def test_every_key_of_a_record_is_explained() -> None:
    _, _, page = (DOCS / "studies.md").read_text("utf-8").partition("## What a run leaves")
    table = page.partition("\n## ")[0]
    assert field_names(RunRecord) | set(CurvePoint.model_fields) <= code_words(table)
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(RunRecord.model_fields)


def test_the_page_shows_the_study_of_ones_own_that_the_tests_run() -> None:
    shown = (DOCS / "own_study.yaml").read_text("utf-8")
    page = (DOCS / "studies.md").read_text("utf-8")
    assert f"```yaml\n{shown}```" in page
    assert f"```python\n{(DOCS / 'own_study.py').read_text('utf-8')}```" in page


@pytest.mark.parametrize(
    ("page", "folder"), [("equal-agreement.md", "core"), ("mathematics.md", ".")]
)
def test_every_test_that_a_page_names_is_there(page: str, folder: str) -> None:
    sources = (ROOT / "tests" / folder).rglob("test_*.py")
    tests = "".join(source.read_text("utf-8") for source in sources)
    named = re.findall(r"`(test_\w+)`", (DOCS / page).read_text("utf-8"))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_the_picture_of_the_tasks_is_drawn_from_what_the_library_returns(tmp_path: Path) -> None:
    figure = runpy.run_path(str(DOCS / "figures/equal_agreement.py"))
    texts = [text.get_text() for text in figure["draw"]().legends[0].get_texts()]
    for text, (aggregator, _) in zip(texts, figure["STEPS"].values(), strict=True):
        update, tasks = aggregator(figure["TASKS"]).double(), figure["TASKS"].double()
        cosines = tasks @ update / tasks.norm(dim=1) / update.norm()
        assert text.endswith(f"{cosines[0]:.2f} and {cosines[1]:.2f}")


def test_every_step_of_the_pipeline_is_where_its_table_says() -> None:
    core = ROOT / "gradagree_opt" / "core"
    steps = re.findall(r"\| `(\w+\.py)` \| `(\w+)` \|", (core / "README.md").read_text("utf-8"))
    assert {file for file, _ in steps} == {file.name for file in core.glob("[!_]*.py")}
    for file, name in steps:
        assert re.search(rf"^(def|class) {name}\b", (core / file).read_text("utf-8"), re.MULTILINE)


def test_the_first_screen_has_the_numbers_of_the_recorded_study() -> None:
    """At a shared rate agreement is ahead of the mean, at tuned ones behind; then the errors."""
    figure = runpy.run_path(str(DOCS / "figures/outer_rates.py"))
    losses = figure["losses"]()
    assert losses["equal agreement"][1] < losses["agreement"][1] < losses["mean"][1]
    assert losses["equal agreement"].min() < losses["mean"].min() < losses["agreement"].min()
    texts = [text.get_text() for text in figure["draw"]().legends[0].get_texts()]
    assert texts == [label for label, _, _ in figure["LOOKS"].values()]
    table = pd.read_csv(DOCS / "results/equal-sine/table.csv").set_index("method")
    screen = " ".join((ROOT / "README.md").read_text("utf-8").partition("\n## ")[0].split())
    for method in figure["LOOKS"]:
        mean, half = table.loc[method, ["mean_5_steps", "half_width_5_steps"]]
        assert f"{mean:.4f} ± {half:.4f}" in screen
