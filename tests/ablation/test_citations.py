"""The methods text and its references: nothing that was not used, nothing that is missing."""

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gradagree_opt.ablation import citations
from gradagree_opt.ablation.citations import bibtex, entries, methods_text
from gradagree_opt.ablation.loading import load, shipped
from gradagree_opt.ablation.methods import Method
from gradagree_opt.ablation.recorded import Config, read_config
from gradagree_opt.ablation.study import MAMLForm, OmniglotTasks, SineTasks, Study
from gradagree_opt.cli import app

ROOT = Path(__file__).parents[2]
ALWAYS = {"gradagree_opt", "paszke2019pytorch", "virtanen2020scipy"}
LATEX = next(filter(shutil.which, ("tectonic", "pdflatex")), None)


@pytest.fixture(scope="module")
def config(finished: Path) -> Config:
    return read_config(finished)


def with_study(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"study": config.study.model_copy(update=changes)})


def parse(text: str) -> dict[str, dict[str, str]]:
    """The entries of a BibTeX file, their kind as the field "entry"; every character is read."""
    found: dict[str, dict[str, str]] = {}
    place = 0
    while text[place:].strip():
        head = re.compile(r"\s*@(\w+)\{(\w+),").match(text, place)
        assert head, text[place : place + 40]
        assert head[2] not in found
        fields = found[head[2]] = {"entry": head[1]}
        place = head.end()
        while not (end := re.compile(r"\s*\}").match(text, place)):
            field = re.compile(r"\s*(\w+)\s*=\s*\{").match(text, place)
            assert field, text[place : place + 40]
            place, depth = field.end(), 1
            start = place
            while depth:
                depth += {"{": 1, "}": -1}.get(text[place], 0)
                place += 1
            fields[field[1]] = text[start : place - 1]
            place += text[place] == ","
        place = end.end()
    return found


def cited(config: Config) -> set[str]:
    """The keys of the text, which are those of the references, in the same order."""
    keys = list(dict.fromkeys(re.findall(r"@(\w+)", methods_text(config))))
    assert list(parse(bibtex(config))) == keys
    return set(keys) - ALWAYS


def test_every_reference_is_whole() -> None:
    for key, text in entries().items():
        fields = parse(text)[key]
        required = {"title", "author"} | {
            "article": {"journal", "volume", "year"},
            "inproceedings": {"booktitle", "year"},
            "book": {"publisher", "year"},
            "misc": set(),
        }[fields["entry"]]
        assert required <= fields.keys() and all(fields.values())
        assert text.count("{") == text.count("}")
        assert "eprint" not in fields or fields["url"].endswith(fields["eprint"])
        assert key == "gradagree_opt" or fields["year"] in key


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("eshratifar2018gradient", "eprint", "1810.08178"),
        ("nichol2018first", "eprint", "1803.02999"),
        ("li2017meta", "eprint", "1707.09835"),
        ("lake2015human", "doi", "10.1126/science.aab3050"),
    ],
)
def test_references_are_the_papers_meant(key: str, field: str, value: str) -> None:
    assert parse(entries()[key])[key][field] == value


def test_every_reference_known_is_used_by_the_template_and_the_other_way_round() -> None:
    template = Path(citations.__file__).parent / "templates" / "methods.md.j2"
    assert set(re.findall(r"@(\w+)", template.read_text())) == entries().keys()


def test_a_reptile_study_of_the_papers_sines_cites_reptile_and_the_paper(config: Config) -> None:
    assert cited(config) == {"eshratifar2018gradient", "nichol2018first"}


@pytest.mark.parametrize(("first_order", "expected"), [(False, set()), (True, {"nichol2018first"})])
def test_a_maml_study_cites_maml_and_its_first_order_form_where_used(
    config: Config, first_order: bool, expected: set[str]
) -> None:
    form = MAMLForm(kind="maml", first_order=first_order)
    changed = with_study(config, form=form)
    assert cited(changed) == {"eshratifar2018gradient", "finn2017model"} | expected
    assert ("first-order MAML" in methods_text(changed)) == first_order


def test_drawings_bring_omniglot_and_its_split(config: Config) -> None:
    tasks = OmniglotTasks(kind="omniglot", way=7, support_shots=1)
    changed = with_study(config, tasks=tasks)
    drawings = {"lake2015human", "vinyals2016matching"}
    assert cited(changed) == {"eshratifar2018gradient", "nichol2018first"} | drawings
    assert "7-way classification" in methods_text(changed)


def test_real_groups_bring_the_source_of_their_data(config: Config) -> None:
    tasks = SimpleNamespace(kind="grouped", dataset="Milk", support_shots=5)
    changed = with_study(config, tasks=tasks)
    assert cited(changed) >= {"diggle1994analysis"}
    assert "data set Milk of R [@diggle1994analysis], a group a task" in methods_text(changed)


def test_corrupted_tasks_are_owned_up_to(config: Config) -> None:
    corruption = SimpleNamespace(kind="shuffled_labels", fraction=0.25)
    text = methods_text(with_study(config, corruption=corruption))
    assert "a share of 0.25 was corrupted (shuffled labels)." in text
    assert "corrupted" not in methods_text(config)


def test_no_section_of_a_study_is_forgotten() -> None:
    template = Path(citations.__file__).parent / "templates" / "methods.md.j2"
    silent = {"name", "title", "quick", "compile"}  # the numbers do not depend on them
    for section in Study.model_fields.keys() - silent:
        assert f"study.{section}" in template.read_text(), section


def test_adam_is_cited_where_it_is_used(config: Config) -> None:
    outer = config.study.outer.model_copy(update={"optimizer": "adam"})
    assert "kingma2015adam" in cited(with_study(config, outer=outer))
    assert "kingma2015adam" not in cited(config)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"aggregator": "mean"}, set()),
        ({"aggregator": "random_weights"}, set()),
        ({"aggregator": "gradient_agreement"}, {"eshratifar2018gradient"}),
        (
            {"aggregator": "mean", "options": {"match_norm": "agreement"}},
            {"eshratifar2018gradient"},
        ),
    ],
)
def test_agreement_is_cited_where_a_method_uses_it(
    config: Config, method: dict[str, Any], expected: set[str]
) -> None:
    methods = [Method(name="mean", aggregator="mean"), Method(name="other", **method)]
    tasks = SineTasks(kind="sine", ranges="finn", support_shots=10)
    found = cited(with_study(config, methods=methods, tasks=tasks))
    assert found == {"nichol2018first", "finn2017model"} | expected


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
        "12 of them",
        "from 0.25, 0.5 by the loss after 1 gradient step on 10 validation tasks, with 1 of the",
        "from 2 seeds",
        "12 unseen tasks after 0, 1, 2 gradient steps on 5 examples",
        f"PyTorch {config.packages['torch']}",
    ):
        assert words in text, words


def test_every_shipped_study_has_words_for_all_that_it_uses(config: Config) -> None:
    for name in shipped():
        text = methods_text(config.model_copy(update={"study": load(name)}))
        assert "of the kind" not in text and "_" not in re.sub(r"@\w+|\w+ = ", "", text)


def test_the_library_is_cited_as_in_citation_cff_in_the_version_that_ran(config: Config) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    entry = parse(bibtex(config))["gradagree_opt"]
    assert entry["title"].replace("{", "").replace("}", "") == citation["title"]
    assert entry["author"] == "{" + citation["authors"][0]["name"] + "}"
    assert entry["note"] == f"Version {citation['version']}"
    other = config.model_copy(update={"packages": config.packages | {"gradagree-opt": "9.9"}})
    assert parse(bibtex(other))["gradagree_opt"]["note"] == "Version 9.9"
    paper = parse(bibtex(config))["eshratifar2018gradient"]
    assert paper["title"] == citation["references"][0]["title"]


def test_cite_prints_what_lies_beside_the_artefacts(finished: Path) -> None:
    result = CliRunner().invoke(app, ["cite", str(finished)])
    methods = (finished / "methods.md").read_text()
    references = (finished / "references.bib").read_text()
    assert result.exit_code == 0
    assert result.stdout == f"{methods}\n{references}"
    page = (finished / "report.html").read_text()
    assert methods.strip().split('"')[0] in page and "@misc{nichol2018first," in page


def test_a_study_that_is_not_finished_can_be_cited(copied: Path) -> None:
    shutil.rmtree(copied / "runs")
    assert CliRunner().invoke(app, ["cite", str(copied)]).exit_code == 0


@pytest.mark.skipif(LATEX is None, reason="no tectonic or pdflatex to compile table.tex with")
def test_the_table_compiles_with_the_references(finished: Path, tmp_path: Path) -> None:
    assert LATEX is not None
    for name in ("table.tex", "references.bib"):
        shutil.copy(finished / name, tmp_path)
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage{booktabs}\n"
        "\\begin{document}\n\\input{table}\n\\nocite{*}\n\\bibliographystyle{plain}\n"
        "\\bibliography{references}\n\\end{document}\n"
    )
    options = [] if LATEX == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]
    command = [LATEX, *options, "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF-")
