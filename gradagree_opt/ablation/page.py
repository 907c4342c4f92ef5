"""The report of a study as one page of HTML that needs nothing else."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from gradagree_opt.ablation import tables
from gradagree_opt.ablation.citations import bibtex, methods_text
from gradagree_opt.ablation.recorded import Config
from gradagree_opt.ablation.style import INK, save
from gradagree_opt.ablation.sweep import Results

CAPTIONS = {
    "learning-curves": "Validation loss through training: mean over seeds, and its 95 % interval.",
    "tuned-rates": "What each method reaches at every candidate outer rate, on the seeds that the "
    "rates are tuned on. The rate is chosen by the validation loss alone.",
    "agreement": "Weights and cancellation of the training batches, averaged over seeds.",
    "adaptation": "One unseen task: predictions after 0 to 5 gradient steps, before training and "
    "after each method.",
}
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")


class Cell(NamedTuple):
    """What is shown in a table, and the number it is sorted by, if it is one."""

    text: str
    number: float | None


class PageTable(NamedTuple):
    """A sortable table; ``folded`` ones are opened by the reader."""

    name: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    folded: bool


class Picture(NamedTuple):
    """A figure as inline SVG."""

    name: str
    caption: str
    svg: Markup


def html(results: Results, config: Config, figures: Mapping[str, Figure]) -> str:
    """The page: tables, figures, configuration, and how to cite."""
    environment = Environment(
        loader=PackageLoader("gradagree_opt.ablation"), autoescape=True, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        study=results.study,
        config=config,
        notes=tables.notes(results),
        tables=[
            page_table("methods", "The methods, the best first", tables.summary(results)),
            page_table("runs", "All runs", every_run(results), folded=True),
        ],
        figures=[
            Picture(name, CAPTIONS[name], inline_svg(figure, name))
            for name, figure in figures.items()
        ],
        settings=yaml.safe_dump(
            results.study.model_dump(mode="json", exclude={"quick"}),
            sort_keys=False,
            allow_unicode=True,
        ),
        methods=methods_text(config),
        bibtex=bibtex(config),
    )


def every_run(results: Results) -> pd.DataFrame:
    """Every run after the number of steps that the rates are tuned for, as text."""
    steps = results.study.tuning.steps
    runs = tables.all_runs(results)
    runs = runs[runs["steps"] == steps].drop(columns="steps")
    runs["chosen"] = runs["chosen"].map({True: "yes", False: ""})
    shown: pd.DataFrame = runs.map(lambda value: f"{value:.6g}" if is_number(value) else str(value))
    shown.columns = [column.replace("_", " ") for column in shown.columns]
    return shown


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def page_table(name: str, caption: str, table: pd.DataFrame, *, folded: bool = False) -> PageTable:
    columns = list(table.columns)
    rows = [
        [
            Cell(text, None if column == "method" else number_in(text))
            for column, text in zip(columns, row, strict=True)
        ]
        for row in table.to_numpy().tolist()
    ]
    return PageTable(name, caption, columns, rows, folded)


def number_in(text: str) -> float | None:
    """The number that a cell begins with; a diverged run is worse than every number."""
    if text in {"diverged", "inf"}:
        return math.inf
    found = NUMBER.match(text)
    return float(found[0]) if found else None


def inline_svg(figure: Figure, name: str) -> Markup:
    """The figure as an element of the page, its ink in the colour of the page's text."""
    text = save(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)  # ids are the whole page's
    text = text.replace(INK, "currentColor")
    label = f'<svg role="img" aria-label="{Markup.escape(CAPTIONS[name])}"'
    return Markup(text.replace("<svg", label, 1))  # our own drawing
