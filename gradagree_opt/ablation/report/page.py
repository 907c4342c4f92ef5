"""The report of a study as one page of HTML that needs nothing else."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from gradagree_opt.ablation.report.citations import bibtex, methods_text
from gradagree_opt.ablation.report.report import Report
from gradagree_opt.ablation.report.style import INK, save
from gradagree_opt.ablation.runs.store import Config
from gradagree_opt.ablation.runs.sweep import Part

CAPTIONS = {
    "learning-curves": "Validation loss through training: mean over seeds, and its 95 % interval.",
    "seconds": "Validation loss by time on the machine at hand: mean over seeds, and its 95 % "
    "interval. Runs of one method are trained in groups; the seconds of a run are its share of its "
    "group's, those of validation and test included.",
    "tuned-rates": "What each method reaches at every candidate outer rate, on the seeds that the "
    "rates are tuned on. The rate is chosen by the validation loss alone.",
    "agreement": "Weights and cancellation of the training batches, averaged over seeds.",
    "agreement-matrix": "Agreement of the tasks of one training batch, the same for every method: "
    "cosines between the displacements of their inner loops, in multi-task training between their "
    "gradients in the trunk, by the parameters that the first seed was trained to.",
    "corruption": "The test after the steps that rates are tuned for, by the share of the training "
    "tasks that are corrupted: mean over seeds, and its 95 % interval. At each share every method "
    "has the rate chosen there.",
    "adaptation": "One unseen task: predictions after 0 to 5 gradient steps, before training and "
    "after each method.",
}
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")


class Cell(NamedTuple):
    """What is shown in a table, and the number it is sorted by, if it is one.

    Attributes:
        is_header: Whether it names the method of its row.
    """

    text: str
    number: float | None
    is_header: bool


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


def html(report: Report, config: Config, figures: Mapping[str, Figure]) -> str:
    """The page: tables, figures, configuration, and how to cite."""
    environment = Environment(
        loader=PackageLoader("gradagree_opt.ablation"), autoescape=True, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        study=config.study,
        config=config,
        notes=report.notes + report.comparison_notes,
        tables=[
            page_table("methods", "The methods, the best first", report.summary),
            page_table("runs", "All runs", every_run(report), folded=True),
        ],
        figures=[
            Picture(name, caption(name, report.parts), inline_svg(figure, name))
            for name, figure in figures.items()
        ],
        settings=yaml.safe_dump(
            config.study.model_dump(mode="json", exclude={"quick"}, exclude_none=True),
            sort_keys=False,
            allow_unicode=True,
        ),
        methods=methods_text(config),
        bibtex=bibtex(config),
    )


def caption(name: str, parts: Sequence[Part]) -> str:
    """What a figure shows; of several parts, all figures but one show the last."""
    if len(parts) == 1 or name == "corruption":
        return CAPTIONS[name]
    share = f"{100 * parts[-1].study.fraction:g} %"
    return f"{CAPTIONS[name]} Trained with {share} of the training tasks corrupted."


def every_run(report: Report) -> pd.DataFrame:
    """Every run after the number of steps that the rates are tuned for, as text."""
    steps, runs = report.parts[0].study.tuning.steps, report.runs
    runs = runs[runs["steps"] == steps].drop(columns="steps")
    runs["chosen"] = runs["chosen"].map({True: "yes", False: ""})
    shown: pd.DataFrame = runs.map(
        lambda value: f"{value:.6g}" if isinstance(value, float) else str(value)
    )
    shown.columns = [column.replace("_", " ") for column in shown.columns]
    return shown


def page_table(name: str, caption: str, table: pd.DataFrame, *, folded: bool = False) -> PageTable:
    columns = list(table.columns)
    rows = [
        [
            Cell(text, None if column == "method" else number_in(text), column == "method")
            for column, text in zip(columns, row, strict=True)
        ]
        for row in table.to_numpy().tolist()
    ]
    return PageTable(name, caption, columns, rows, folded)


def number_in(text: str) -> float | None:
    """The number that a cell begins with, also as a bound; none for a run that diverged."""
    found = NUMBER.match(text.removeprefix("< "))
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
