"""What users may rely on: a change of a name, an option or its default is seen here, and wanted."""

import doctest
import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest

import gradagree_opt as ga

ROOT = Path(__file__).parents[1]
PAGES = "\n\n".join(
    page.read_text("utf-8") for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
)
SNAPSHOT = Path(__file__).with_suffix(".txt")
"""Written anew by: python tests/test_public_api.py"""


def options(function: object) -> str:
    """Parameters with their kinds and defaults; annotations are left out."""
    found = inspect.signature(function)  # type: ignore[arg-type]
    plain = [
        p.replace(
            annotation=p.empty, default=p.default if p.default is p.empty else Shown(p.default)
        )
        for p in found.parameters.values()
    ]
    return str(inspect.Signature(plain))


class Shown:
    """A default by a repr that holds no address."""

    def __init__(self, value: object) -> None:
        plain = value is None or isinstance(value, (bool, int, float, str, tuple))
        self.text = repr(value) if plain else f"<{type(value).__name__}>"

    def __repr__(self) -> str:
        return self.text


def public(value: object) -> list[str]:
    """The fields of a result, and the methods that a page calls; others are for the engines."""
    if not inspect.isclass(value):
        return []
    own = {n for c in value.__mro__ if c.__module__.startswith("gradagree_opt") for n in vars(c)}
    called = {name for name in own if name[0] != "_" and re.search(rf"\.{name}\(", PAGES)}
    return sorted({*getattr(value, "_fields", ()), *called})


def snapshot() -> str:
    lines = []
    for name in ga.__all__:
        value = getattr(ga, name)
        made = inspect.isclass(value) and getattr(value, "_is_protocol", False)
        shown = options(value) if callable(value) and not made else ""
        lines.append(f"{name}{shown}")
        for member in public(value):
            method = inspect.getattr_static(value, member)
            lines.append(f"    {member}{options(method) if inspect.isfunction(method) else ''}")
    return "\n".join(lines) + "\n"


def test_the_public_interface_is_the_one_recorded() -> None:
    assert snapshot() == SNAPSHOT.read_text("utf-8")


def test_names_are_sorted_and_there() -> None:
    assert len(set(ga.__all__)) == len(ga.__all__)
    assert all(hasattr(ga, name) for name in ga.__all__)


@pytest.mark.parametrize("name", ga.__all__)
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    """In its docstring, one of its methods' or of its module's, or on a page; all are doctests."""
    value = getattr(ga, name)
    if inspect.isclass(value):
        methods = [getattr(value, member) for member in public(value)]
        texts = [each.__doc__ or "" for each in (value, *methods)]
        named = any(doctest.DocTestParser().get_examples(text) for text in texts)
    else:
        named = bool(doctest.DocTestParser().get_examples(value.__doc__ or ""))
    examples = doctest.DocTestParser().get_examples(PAGES)
    assert named or any(re.search(rf"\b{name}\b", e.source + e.want) for e in examples)


def test_the_version_is_that_of_the_package_and_of_the_citation() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert ga.__version__ == metadata.version("gradagree-opt")
    assert f"\nversion: {ga.__version__}\n" in citation


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), "utf-8")
