"""The site: it builds strictly, loads nothing from elsewhere, and lists what there is."""

import ast
import importlib.util
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gradagree_opt as ga
from gradagree_opt import tasks
from gradagree_testing.browser import EXECUTABLE, Browser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TROUBLES = runpy.run_path(str(DOCS / "troubleshooting.py"))


class Page(HTMLParser):
    """What a page links to, what it loads, and the names that lead into it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attributes}
        self.names |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("img", "script") and "src" in found:
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material")):
        pytest.skip("no mkdocs-material to build the site with: pip install --group docs")
    out = tmp_path_factory.mktemp("site")
    command = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.mark.slow
def test_every_page_that_is_listed_is_there(pages: dict[Path, Page], site: Path) -> None:
    def listed(items: list[Any]) -> list[str]:
        found = [value for item in items for value in item.values()]
        return [one for v in found for one in (listed(v) if isinstance(v, list) else [v])]

    names = re.search(
        r"^nav:\n.*", (ROOT / "mkdocs.yml").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert names is not None
    expected = {
        site / name.replace(".md", ".html") for name in listed(yaml.safe_load(names[0])["nav"])
    }
    assert len(expected) > 15 and expected <= set(pages)
    shown = {*DOCS.glob("*.md"), *DOCS.glob("adapters/*.md")}
    shown.remove(
        DOCS / "performance.md"
    )  # for those who work on the library: CONTRIBUTING links to it
    assert {site / p.relative_to(DOCS).with_suffix(".html") for p in shown} <= expected


@pytest.mark.slow
def test_no_link_leads_nowhere_and_nothing_is_loaded_from_elsewhere(
    pages: dict[Path, Page], site: Path
) -> None:
    for path, page in pages.items():
        assert not [source for source in page.loaded if re.match(r"(\w+:)?//", source)], path
        for link in [*page.links, *page.loaded]:
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:", link) or target in (".", ".."):
                continue
            place = (path.parent / target.partition("?")[0]).resolve() if target else path
            assert place.exists(), f"{path.relative_to(site)} → {link}"
            if anchor and place in pages:
                assert anchor in pages[place].names, f"{path.relative_to(site)} → {link}"


def test_no_page_of_the_repository_links_to_what_is_not_there() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not re.match(r"\w+:", target):
                assert (page.parent / target).exists(), f"{page} → {target}"


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(pages: dict[Path, Page], site: Path) -> None:
    names = pages[site / "api.html"].names
    assert {f"gradagree_opt.{name}" for name in ga.__all__} <= names
    assert {f"gradagree_opt.tasks.{name}" for name in tasks.__all__} <= names
    last = {each.rpartition(".")[2] for each in names if each.startswith(("adapters.", "gradag"))}
    for file in (ROOT / "adapters").glob("*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                assert set(ast.literal_eval(node.value)) <= last, file.stem


@pytest.mark.slow
def test_docstrings_are_shown_as_they_are_meant(site: Path) -> None:
    text = (site / "api.html").read_text("utf-8")
    assert not re.search(r":(class|data|func|meth|mod):", text)
    assert not re.search(
        r"<code>\w+, [\w, ]+</code>", text
    )  # a row of two parameters has no default
    returns = re.findall(r"Returns:</span></p>\s*<table>(.*?)</table>", text, re.DOTALL)
    assert len(returns) > 10 and {each.count("doc-section-item") for each in returns} == {1}


def test_the_tour_on_the_site_is_the_whole_script() -> None:
    page = runpy.run_path(str(DOCS / "site.py"))["tour"]()
    shown = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    meant = ast.parse((DOCS / "tour.py").read_text("utf-8"))
    assert ast.dump(ast.Module(meant.body[1:], [])) == ast.dump(ast.parse(shown))


@pytest.mark.slow
def test_an_interval_stays_beside_its_number(site: Path) -> None:
    shown = (site / "results.html").read_text("utf-8")
    assert re.findall(r"\d ± \d", (DOCS / "results.md").read_text("utf-8"))
    assert not re.findall(r"\d ± \d", shown)


def test_the_page_of_messages_is_that_of_the_source() -> None:
    shown = (DOCS / "troubleshooting.md").read_text("utf-8")
    assert shown == TROUBLES["page"](), "run: python docs/troubleshooting.py"


def test_every_message_that_is_raised_is_on_the_page() -> None:
    """Found by their words in the source, not by its syntax tree."""
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    count = 0
    for folder in (ROOT / "gradagree_opt", ROOT / "adapters"):
        for file in folder.rglob("*.py"):
            for start in re.findall(
                r"raise \w+Error\(\s*f?\"(expected [^\"{]{8,})", file.read_text("utf-8")
            ):
                count += 1
                assert start in page, f"{file.name}: {start}"
    assert count > 100


def test_every_group_of_messages_has_some_and_every_file_a_group() -> None:
    titles = {TROUBLES["group"](file) for file in TROUBLES["found"]()}
    assert titles == {each["title"] for each in TROUBLES["GROUPS"]}
    with pytest.raises(LookupError, match=r"new\.py"):
        TROUBLES["group"]("new.py")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium to look at the site with")
def test_every_page_fits_a_desk_and_a_phone_in_both_themes_and_asks_for_nothing_else(
    pages: dict[Path, Page], tmp_path: Path
) -> None:
    with Browser(tmp_path) as browser:
        for width, scheme, palette in ((1280, "light", "default"), (360, "dark", "slate")):
            browser.emulate(width=width, height=800, scheme=scheme)
            for path in sorted(pages):
                browser.open(path)
                browser.evaluate("localStorage.clear()")  # where a theme is remembered
                root = "document.documentElement"
                spare = browser.evaluate(f"{root}.clientWidth - {root}.scrollWidth")
                requests = [e for e in browser.events if e["method"] == "Network.requestWillBeSent"]
                urls = [each["params"]["request"]["url"] for each in requests]
                assert spare == 0, f"{path.name} is wider than {width} px"
                assert all(url.startswith(("file:", "data:")) for url in urls), path.name
                shown = browser.evaluate("document.body.dataset.mdColorScheme")
                assert shown == palette, f"{path.name}: {shown}"


@pytest.mark.slow
@pytest.mark.long
def test_the_tour_shows_what_it_says() -> None:
    try:
        tour = runpy.run_path(str(DOCS / "tour.py"))
    finally:
        torch.set_printoptions(profile="default")
    spreads = tour["spreads"]
    assert min(spreads, key=spreads.get) == "EqualAgreement"
    assert spreads["GradientAgreement"] != pytest.approx(spreads["Mean"])
    assert max(tour["trained"].values()) < tour["untrained"]
    cosines = tour["cosines"]
    assert cosines.shape == (5, 5) and cosines.diagonal().allclose(cosines.new_ones(5))
    assert len(tour["table"]) == 3 and tour["table"]["mean_5_steps"].notna().all()
