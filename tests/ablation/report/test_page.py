"""report.html as text: what is escaped, what it names, and what its cells are sorted by."""

import html as entities
import re
from pathlib import Path

import pytest

from gradagree_opt.ablation.report import figures
from gradagree_opt.ablation.report.page import html, inline_svg, number_in
from gradagree_opt.ablation.report.report import build_report
from gradagree_opt.ablation.runs.store import Config, read_config, read_results
from gradagree_opt.ablation.runs.sweep import Part


@pytest.fixture(scope="module")
def config(finished: Path) -> Config:
    return read_config(finished)


@pytest.fixture(scope="module")
def results(finished: Path, config: Config) -> Part:
    [results] = read_results(finished, config)
    return results


def test_what_a_study_file_says_is_text_never_markup(results: Part, config: Config) -> None:
    title = '<script>alert(1)</script> & "co"'
    study = results.study.model_copy(update={"title": title})
    page = html(
        build_report([Part(study, results.records, results.rates)]),
        config.model_copy(update={"study": study}),
        {},
    )
    assert page.count("<script>") == 1  # our own
    assert f"<h1>{entities.escape(title)}</h1>".replace("&quot;", "&#34;") in page
    assert "random_weights &amp; co" in page


@pytest.mark.parametrize("study", ["finished", "swept"])
def test_all_that_is_said_below_the_table_is_said_on_the_page(
    request: pytest.FixtureRequest, study: str
) -> None:
    folder = request.getfixturevalue(study)
    _, _, below = (folder / "table.md").read_text(encoding="utf-8").partition("\n\n")
    page = entities.unescape((folder / "report.html").read_text(encoding="utf-8"))
    notes = re.findall(r"<p>(.*)</p>", page[: page.index("<nav")])
    assert notes == [line.rstrip() for line in below.splitlines()]
    assert any("Holm" in note for note in notes)


def test_seeds_are_shown_as_they_are_and_told_apart(results: Part, config: Config) -> None:
    far = {seed: seed + 20240500 for seed in results.study.seeds}
    study = results.study.model_copy(update={"seeds": list(far.values())})
    records = {
        (name, rate, far[seed]): record.model_copy(
            update={"run": record.run.model_copy(update={"seed": far[seed]})}
        )
        for (name, rate, seed), record in results.records.items()
    }
    page = html(build_report([Part(study, records, results.rates)]), config, {})
    cells = re.findall(r'<td data-number="([\d.]+)">(2024\d+)</td>', page)
    assert sorted(int(text) for _, text in cells) == sorted(seed for _, _, seed in records)
    assert all(float(number) == int(text) for number, text in cells)


def test_the_page_names_no_address_that_a_browser_would_load(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|srcset|data|poster|action)="[^"]*"', page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert "url(" not in page.replace("url(#", "") and "@import" not in page
    assert "<link" not in page and "<iframe" not in page


def test_figures_in_the_page_refer_to_their_own_parts(results: Part) -> None:
    svg = str(inline_svg(figures.learning_curves(results), "learning-curves"))
    ids = set(re.findall(r' id="([^"]*)"', svg))
    used = set(re.findall(r'(?:href="|url\()#([^")]*)', svg))
    assert used and used <= ids and all(name.startswith("learning-curves-") for name in ids)
    assert "#000000" not in svg and "currentColor" in svg


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-0.5 ± 0.1", -0.5),
        ("+2.8018 ± 0.7731", 2.8018),
        ("2†", 2.0),
        ("1e-05", 1e-05),
        ("< 0.001", 0.001),
        ("diverged", None),
        ("", None),
        ("yes", None),
    ],
)
def test_a_cell_is_sorted_by_the_number_it_begins_with(text: str, number: float | None) -> None:
    assert number_in(text) == number
