"""The results in docs/: what stands there is what their recorded runs give."""

import re
from pathlib import Path

import pytest

from gradagree_opt.ablation import layouts, tables
from gradagree_opt.ablation.citations import bibtex, methods_text
from gradagree_opt.ablation.recorded import read_config, read_results

DOCS = Path(__file__).parents[2] / "docs"
INTERVAL = re.compile(r"[+-]?\d+\.\d+ ± \d+\.\d+")
STUDIES = sorted(path.parent for path in DOCS.glob("results/*/config.json"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_tables_and_citations_are_those_of_the_recorded_runs(folder: Path) -> None:
    config = read_config(folder)
    parts = read_results(folder, config)
    written = {
        "results.csv": tables.all_runs(parts).to_csv(index=False),
        "table.csv": tables.numbers(parts).to_csv(index=False),
        "table.md": layouts.markdown(parts),
        "table.tex": layouts.latex(parts),
        "methods.md": methods_text(config),
        "references.bib": bibtex(config),
    }
    for name, text in written.items():
        assert (folder / name).read_text(encoding="utf-8") == text, name


def test_every_interval_on_the_page_is_one_of_a_study_or_the_papers() -> None:
    studied = {
        found for folder in STUDIES for found in INTERVAL.findall((folder / "table.md").read_text())
    }
    page = (DOCS / "results.md").read_text(encoding="utf-8").splitlines()
    ours = [line for line in page if not line.startswith("| paper")]
    shown = [found for line in ours for found in INTERVAL.findall(line)]
    assert len(shown) > 20
    assert [found for found in shown if found not in studied] == []
