"""The documentation names what there is: public names, options, diagnostics, keys of a study."""

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import gradagree_opt as ga
from gradagree_opt.ablation.loading import load
from gradagree_opt.ablation.methods import AGGREGATORS
from gradagree_opt.ablation.study import Study

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
        if inspect.isclass(hint) and issubclass(hint, BaseModel) and hint is not model:
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
