"""The table of a study laid out: Markdown and terminal for people, LaTeX for papers."""

import re

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from gradagree_opt.ablation.report.report import Report
from gradagree_opt.ablation.report.tables import ADJUSTED_P, EDGE, EFFECT_SIZE, counted

NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
)
LETTERS = zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ", NAMES.split(), strict=True)
GREEK = str.maketrans({letter: rf"$\{name}$" for letter, name in LETTERS})
"""Letters in the names of methods, such as λ = 0.1, which pdfLaTeX has in formulas alone."""


def markdown(report: Report) -> str:
    table = report.summary
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    all_notes = report.notes + report.comparison_notes
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{note}  " for note in all_notes)]) + "\n"


def latex(report: Report) -> str:
    """A booktabs table, a rule between its parts; the notes are comments above it."""
    style = report.summary.style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis="columns")
    left = 1 + list(style.columns).index("outer rate")
    body: str = style.to_latex(
        hrules=True, column_format="l" * left + "r" * (len(style.columns) - left)
    )
    body = body.replace("±", r"$\pm$").replace(EDGE, r"$^\dagger$").translate(GREEK)
    body = re.sub(r"[<>|]", r"$\g<0>$", body)
    # In front of a name, so that it is no argument of the line break before it.
    body = re.sub(r"^(?=[\[*])", "{}", body, flags=re.MULTILINE)
    body = re.sub(r"(?<=[&=] )-(?=\d)", "$-$", body)
    lines, rows = body.splitlines(keepends=True), len(report.parts[0].rates)
    first = lines.index("\\midrule\n") + 1
    for start in range(first + rows * (len(report.parts) - 1), first, -rows):
        lines.insert(start, "\\midrule\n")
    body = "".join(lines)
    all_notes = report.notes + report.comparison_notes
    return "".join(f"% {note}\n" for note in all_notes) + body


def terminal(report: Report) -> Table:
    """The table without tests: eight columns are what a terminal of eighty characters holds.

    With a column more for its parts it has the steps alone that rates are chosen by.
    """
    study = report.parts[0].study
    hidden = [counted(count, "step") for count in study.test.steps if count != study.tuning.steps]
    more = hidden if len(report.parts) > 1 else []
    table = report.summary.drop(columns=[ADJUSTED_P, EFFECT_SIZE, *more])
    shown = Table(
        caption=Text("\n".join(report.notes)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for column in table.columns:
        justify: JustifyMethod = "left" if column == "method" else "right"
        shown.add_column(Text(column), justify=justify, overflow="fold")  # no digit is lost
    for place, row in enumerate(table.to_numpy().tolist()):
        if place % len(study.methods) == 0:
            shown.add_section()
        shown.add_row(*(Text(cell.replace(" ± ", "\n± ")) for cell in row))
    return shown
