"""report.html in Chromium: what it shows, how it sorts, both themes, phone width, no request."""

import math
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradagree_opt.ablation.report.page import html
from gradagree_opt.ablation.report.report import build_report
from gradagree_opt.ablation.runs.store import Config, read_config, read_results
from gradagree_opt.ablation.runs.sweep import Part
from gradagree_testing.browser import EXECUTABLE, Browser

if EXECUTABLE is None:
    pytest.skip(
        "no Chromium to look at report.html with: apt-get install chromium", allow_module_level=True
    )
pytestmark = pytest.mark.slow
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
TEXTS = ("body", ".notes p", "caption", "nav a")


@pytest.fixture(scope="module")
def config(finished: Path) -> Config:
    return read_config(finished)


@pytest.fixture(scope="module")
def results(finished: Path, config: Config) -> Part:
    [results] = read_results(finished, config)
    return results


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


def column(browser: Browser, table: str, number: int) -> list[str]:
    rows = f"[...document.querySelector('#{table}').tBodies[0].rows]"
    found: list[str] = browser.evaluate(f"{rows}.map(row => row.cells[{number}].textContent)")
    return found


def click(browser: Browser, table: str, number: int) -> list[Any]:
    """Sorts by a column, and returns every header's aria-sort."""
    headers = f"[...document.querySelectorAll('#{table} thead th')]"
    browser.evaluate(f"{headers}[{number}].querySelector('button').click()")
    found: list[Any] = browser.evaluate(f"{headers}.map(th => th.getAttribute('aria-sort'))")
    return found


def test_the_page_loads_nothing_else_and_reports_no_error(browser: Browser, finished: Path) -> None:
    browser.open(finished / "report.html")
    methods = [event["method"] for event in browser.events]
    assert methods.count("Network.requestWillBeSent") == 1
    assert not {"Runtime.exceptionThrown", "Log.entryAdded"} & set(methods)
    assert browser.evaluate("document.title") == "Tiny sine"


def test_the_policy_of_the_page_stops_a_request(browser: Browser, finished: Path) -> None:
    browser.open(finished / "report.html")
    browser.evaluate("void (new Image().src = 'http://127.0.0.1:9/x.png')")
    browser.evaluate("void fetch('http://127.0.0.1:9/x').catch(() => 0)")
    told = [str(e["params"]) for e in browser.events if e["method"] == "Log.entryAdded"]
    assert len(told) >= 2 and all("Content Security Policy" in text for text in told)


def test_the_table_is_that_of_the_study(browser: Browser, finished: Path, results: Part) -> None:
    browser.open(finished / "report.html")
    expected = build_report([results]).summary
    names = "[...document.querySelectorAll('#methods thead th')].map(th => th.textContent)"
    assert browser.evaluate(names) == list(expected.columns)
    for number, name in enumerate(expected.columns):
        assert column(browser, "methods", number) == expected[name].tolist()
    assert len(column(browser, "runs", 0)) == 9


def test_a_click_sorts_by_number_and_the_next_one_turns_it_round(
    browser: Browser, finished: Path
) -> None:
    browser.open(finished / "report.html")
    number = 4  # validation loss
    before = column(browser, "runs", number)
    rows = sorted(zip(map(float, before), column(browser, "runs", 1), strict=True))
    assert click(browser, "runs", number)[number] == "ascending"
    assert [float(text) for text in column(browser, "runs", number)] == [row[0] for row in rows]
    assert column(browser, "runs", 1) == [row[1] for row in rows]  # whole rows move
    assert click(browser, "runs", number)[number] == "descending"
    assert [float(text) for text in column(browser, "runs", number)] == [r[0] for r in rows][::-1]
    assert click(browser, "runs", 0) == ["ascending", None, None, None, None, None]
    names = column(browser, "runs", 0)
    assert names == sorted(names)


def test_a_diverged_run_is_last_whichever_way_it_is_sorted(
    browser: Browser, results: Part, config: Config, tmp_path: Path
) -> None:
    label = ("agreement", results.rates["agreement"], 5)
    record = results.records[label]
    test = dict.fromkeys(record.test, math.inf)
    worse = record.model_copy(update={"validation": math.inf, "test": test})
    page = tmp_path / "report.html"
    changed = Part(results.study, results.records | {label: worse}, results.rates)
    page.write_text(html(build_report([changed]), config, {}), encoding="utf-8")
    browser.open(page)
    for _ in range(2):
        click(browser, "methods", 3)
        assert column(browser, "methods", 3)[-1] == "diverged"
        assert column(browser, "methods", 0)[-1] == "agreement"


def test_headers_are_sorted_by_keyboard_too(browser: Browser, finished: Path) -> None:
    browser.open(finished / "report.html")
    header = "document.querySelector('#methods thead th')"
    browser.evaluate(f"{header}.querySelector('button').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r")
    assert browser.evaluate(f"{header}.getAttribute('aria-sort')") == "ascending"


def test_both_themes_can_be_read_and_figures_are_drawn_in_the_colour_of_the_text(
    browser: Browser, finished: Path
) -> None:
    dark = []
    for scheme in ("light", "dark"):
        browser.emulate(**DESKTOP, scheme=scheme)
        browser.open(finished / "report.html")
        paper = luminance(style(browser, "body", "backgroundColor"))
        for selector in TEXTS:
            ink = luminance(style(browser, selector, "color"))
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 4.5  # WCAG AA
        assert style(browser, "figure svg", "fill") == style(browser, "body", "color")
        dark.append(paper < 0.5)
    assert dark == [False, True]


def style(browser: Browser, selector: str, name: str) -> str:
    found: str = browser.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}")
    return found


def luminance(colour: str) -> float:
    rgb = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("study", ["finished", "swept"])
def test_at_phone_width_the_page_stays_and_wide_things_scroll_in_their_own_box(
    request: pytest.FixtureRequest, browser: Browser, study: str
) -> None:
    browser.emulate(**PHONE, scheme="light")
    browser.open(request.getfixturevalue(study) / "report.html")
    browser.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate("document.body.scrollWidth") == 360
    outside = (
        "[...document.body.querySelectorAll('*')].filter(x => !x.parentElement.closest('.scroll'))"
    )
    edges = f"{outside}.map(x => x.getBoundingClientRect()).filter(x => x.width)"
    assert browser.evaluate(f"{edges}.every(x => x.left >= 16 && x.right <= 344)")  # of 1rem each
    boxes = "[...document.querySelectorAll('.scroll')].filter(x => x.scrollWidth > x.clientWidth)"
    # two tables, five figures of which one may be narrow, and a sixth of several parts
    assert browser.evaluate(f"{boxes}.length") >= 6
    assert browser.evaluate(f"{boxes}.every(x => x.tabIndex === 0)")  # the keyboard scrolls them
    assert browser.evaluate(f"{boxes}.every(x => getComputedStyle(x).overflowX === 'auto')")
    assert browser.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    seen = np.asarray(Image.open(BytesIO(browser.screenshot())).convert("RGB"))
    assert seen.shape[1] == 360
    assert (seen[:, :15] == 255).all() and (seen[:, 345:] == 255).all()  # nothing in the margins
    assert (seen[:, 16:344] < 100).any(axis=(1, 2)).mean() > 0.3  # there is ink in many lines


def test_the_table_of_several_parts_is_long_and_sorted_by_its_first_column_as_by_numbers(
    browser: Browser, swept: Path
) -> None:
    browser.emulate(**DESKTOP, scheme="light")
    browser.open(swept / "report.html")
    expected = build_report(read_results(swept, read_config(swept))).summary
    for number, name in enumerate(expected.columns):
        assert column(browser, "methods", number) == expected[name].tolist()
    assert column(browser, "methods", 0) == [*["0 %"] * 3, *["20 %"] * 3, *["50 %"] * 3]
    names = column(browser, "methods", 1)
    click(browser, "methods", 0)
    assert click(browser, "methods", 0)[0] == "descending"
    assert column(browser, "methods", 0) == [*["50 %"] * 3, *["20 %"] * 3, *["0 %"] * 3]
    assert column(browser, "methods", 1) == names[6:] + names[3:6] + names[:3]  # whole rows move
    click(browser, "methods", 1)
    assert column(browser, "methods", 1) == sorted(names)
    assert len(column(browser, "runs", 0)) == 36  # 3 shares × 3 methods × (2 rates + 2 seeds)
    click(browser, "runs", 0)
    shares = [float(text) for text in column(browser, "runs", 0)]
    assert shares == sorted(shares) and set(shares) == {0, 0.2, 0.5}


def test_no_id_is_given_twice_and_every_figure_has_a_name(browser: Browser, finished: Path) -> None:
    browser.open(finished / "report.html")
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(x => x.id)")
    assert len(ids) == len(set(ids)) > 100
    assert browser.evaluate("[...document.links].every(a => document.querySelector(a.hash))")
    named = "[...document.querySelectorAll('svg')].map(x => x.getAttribute('aria-label'))"
    assert len(browser.evaluate(named)) == 6 and all(browser.evaluate(named))
