"""What the methods text says of a study, and the command that prints it."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from gradagree_opt.ablation.report.citations import methods_text
from gradagree_opt.ablation.report.layouts import latex
from gradagree_opt.ablation.report.report import build_report
from gradagree_opt.ablation.runs.store import Config, read_config, read_results
from gradagree_opt.ablation.study.loading import load, shipped
from gradagree_opt.ablation.study.sections import CorruptionSection
from gradagree_opt.cli import app

from .conftest import with_study

LATEX = next(filter(shutil.which, ("tectonic", "pdflatex")), None)
SILENT = {"name", "title", "quick", "compile"}  # the numbers do not depend on them
SILENT |= {"device", "tf32"}  # told by the hardware of the configuration
UNADAPTED = {"tuning.steps", "test.steps", "test.support_shots", "test.transductive"}
"""Settings that multi-task training has one value for."""


def test_a_test_without_transduction_says_so(config: Config) -> None:
    test = config.study.test.model_copy(update={"transductive": False})
    text = methods_text(with_study(config, test=test))
    assert "every query example in a batch with those and without the others" in text
    assert "without the others" not in methods_text(config)


def test_corrupted_tasks_are_owned_up_to(config: Config) -> None:
    corruption = CorruptionSection(kind="shuffled_labels", fraction=0.25)
    text = methods_text(with_study(config, corruption=corruption))
    assert "a share of 0.25 was corrupted (shuffled labels)." in text
    corruption = CorruptionSection(kind="outlier_scale", fraction=[0, 0.1, 0.5], scale=10)
    text = methods_text(with_study(config, corruption=corruption, seeds=[0, 1, 2]))
    assert "0, 0.1 or 0.5 was corrupted (outlier scale, scale 10); all of the following" in text
    assert "[@holm1979simple] for all shares together and" in text
    corruption = CorruptionSection(kind="label_noise", fraction=1, scale=0.5)
    text = methods_text(with_study(config, corruption=corruption))
    assert "a share of 1 was corrupted (label noise, deviation 0.5)." in text
    assert "corrupted" not in methods_text(config)


def variants(section: BaseModel) -> Iterator[tuple[str, BaseModel]]:
    """The section with one of its settings changed, and the setting's name, for each of them."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        changed: list[Any]
        if name == "methods":
            changed = [value[:-1]]
        elif isinstance(value, BaseModel):
            for inner, other in variants(value):
                yield f"{name}.{inner}", section.model_copy(update={name: other})
            continue
        elif isinstance(value, bool):
            changed = [not value]
        elif isinstance(value, int | float):
            changed = [value + 1]
        elif isinstance(value, list):
            changed = [[*value, value[-1] + 1]]
        elif isinstance(value, str) and name != "kind":
            changed = [next(choice for choice in [*choices, "other"] if choice != value)]
        else:
            changed = []  # a kind, which comes with settings of its own, or one that is not given
        for other in changed:
            yield name, section.model_copy(update={name: other})


@pytest.mark.parametrize("name", ["tiny", *shipped()])
def test_whatever_setting_is_changed_the_text_says_so(config: Config, name: str) -> None:
    study = config.study if name == "tiny" else load(name)
    silent = SILENT | ({"tasks.query_shots"} if study.form.kind == "reptile" else set())
    silent |= set() if study.adapts else UNADAPTED
    packages = config.packages | {"torchjd": "0.18"}

    def text(study: Any) -> str:
        return methods_text(config.model_copy(update={"study": study, "packages": packages}))

    said = text(study)
    same = {setting for setting, other in variants(study) if text(other) == said}
    assert same <= silent


def test_the_text_claims_no_choice_and_no_interval_that_there_was_none_of(config: Config) -> None:
    outer = config.study.outer.model_copy(update={"rates": [0.5]})
    text = methods_text(with_study(config, outer=outer, seeds=[3]))
    assert "The outer rate was 0.5 for every method, which was not tuned." in text
    assert "from 1 seed," in text and "We report that seed's scores, and no intervals." in text
    assert not {"chosen", "Student", "Holm", "Hedges"} & set(re.findall(r"\w+", text))
    two = methods_text(config)  # seeds: p-values, but no correction for their small number
    assert "holm1979simple" in two and "hedges1981distribution" not in two
    three = methods_text(with_study(config, seeds=[3, 5, 6]))
    assert "holm1979simple" in three and "hedges1981distribution" in three


def test_the_text_has_every_number_of_the_study(config: Config) -> None:
    text, study = methods_text(config), config.study
    assert text.count("\n") == 1 and "  " not in text and "{" not in text
    for words in (
        *(f'"{method.name}"' for method in study.methods),
        "negative = clip",
        "10 support examples",
        "8 hidden units (tanh)",
        "3 tasks and 2 inner steps",
        "rate 0.02 on minibatches of 5",
        "5 of them",
        "from 0.25, 0.5 by the loss after 1 gradient step on 10 validation tasks, with 1 of the",
        "from 2 seeds",
        "12 unseen tasks after 0, 1, 2 gradient steps on 5 examples with inputs uniform in [-5, 5]",
        "[-5, 5], all of them in every step",
        "scored on an even grid of 7",
        f"PyTorch {config.packages['torch']}",
    ):
        assert words in text, words


def test_every_shipped_study_has_words_for_all_that_it_uses(config: Config) -> None:
    packages = config.packages | {"torchjd": "0.18"}
    for name in shipped():
        text = methods_text(config.model_copy(update={"study": load(name), "packages": packages}))
        assert "of the kind" not in text and "_" not in re.sub(r"@\w+|\w+ = ", "", text)


def test_cite_prints_what_lies_beside_the_artefacts(finished: Path) -> None:
    result = CliRunner().invoke(app, ["cite", str(finished)])
    methods = (finished / "methods.md").read_text()
    references = (finished / "references.bib").read_text()
    assert result.exit_code == 0
    assert result.stdout == f"{methods}\n{references}"
    assert result.stderr == ""
    page = (finished / "report.html").read_text()
    assert methods.strip().split('"')[0] in page and "@misc{nichol2018first," in page


def test_a_study_that_is_not_finished_can_be_cited_and_is_told_so(copied: Path) -> None:
    shutil.rmtree(copied / "runs")
    result = CliRunner().invoke(app, ["cite", str(copied)])
    assert result.exit_code == 0
    assert result.stderr.startswith("this text is of the finished study: ")
    assert "runs in" in result.stderr and result.stdout == (copied / "methods.md").read_text() + (
        "\n" + (copied / "references.bib").read_text()
    )


def test_a_study_whose_records_cannot_be_read_can_be_cited_and_is_told_so(copied: Path) -> None:
    shutil.rmtree(copied / "runs")
    (copied / "runs").touch()
    result = CliRunner().invoke(app, ["cite", str(copied)])
    assert result.exit_code == 0 and "runs" in result.stderr
    assert result.stdout.startswith((copied / "methods.md").read_text())


def test_signs_in_the_names_of_methods_are_the_same_signs_in_latex(finished: Path) -> None:
    report = build_report(read_results(finished, read_config(finished)))
    names = ["[0<p>1] first", "*|x|* & 50 %, λ = -2"]
    rest = report.summary["method"].tolist()[len(names) :]
    signs = replace(report, summary=report.summary.assign(method=names + rest))
    rows = [line for line in latex(signs).splitlines() if line.startswith("{}")]
    assert [row.split(" & ")[0] for row in rows] == [
        "{}[0$<$p$>$1] first",
        r"{}*$|$x$|$* \& 50 \%, $\lambda$ = $-$2",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    LATEX is None,
    reason="no LaTeX to compile table.tex with: apt-get install texlive-latex-recommended",
)
@pytest.mark.parametrize("study", ["finished", "swept", "damping"])
def test_the_table_compiles_with_the_references(
    request: pytest.FixtureRequest, tmp_path: Path, study: str
) -> None:
    published = Path(__file__).parents[3] / "docs/results/damping"  # its methods are named λ = …
    folder = published if study == "damping" else request.getfixturevalue(study)
    for name in ("table.tex", "references.bib"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage{booktabs}\n"
        "\\begin{document}\n\\input{table}\n\\nocite{*}\n\\bibliographystyle{plain}\n"
        "\\bibliography{references}\n\\end{document}\n"
    )
    if LATEX == "tectonic":  # which calls BibTeX itself
        commands = [["tectonic", "paper.tex"]]
    else:
        pdflatex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        commands = [pdflatex, ["bibtex", "paper"], pdflatex]
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
        assert "Warning--" not in done.stdout  # BibTeX's, of a field that is missing
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF-")
