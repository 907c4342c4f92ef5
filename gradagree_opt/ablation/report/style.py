"""How the figures look: one colour, marker and dash for each method, the same in all of them."""

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Literal, NamedTuple, TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from gradagree_opt.ablation.study.study import Study

Place: TypeAlias = Literal["outside right upper", "outside lower center"]
INK = "#000000"
# Okabe and Ito 2008, told apart with every kind of colour vision; without their yellow, which
# cannot be seen on paper.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX<>*hd"
STYLE: Any = {
    "font.size": 9,
    "text.parse_math": False,  # a name may have dollars
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # TrueType: journals refuse the default, type 3
    "svg.fonttype": "path",  # looks the same where the font is not there
    "svg.hashsalt": "gradagree",
}
NO_DATE = {
    "png": None,
    "pdf": {"CreationDate": None},
    "svg": {"Creator": None, "Date": None, "Format": None, "Type": None},
}


class Look(NamedTuple):
    """What a method's lines are drawn with; markers and dashes tell them apart without colour."""

    color: str
    marker: str
    linestyle: str


def looks(study: Study) -> dict[str, Look]:
    """One look for each method, the baseline in black."""
    others = [method.name for method in study.methods if method.name != study.baseline]
    look = {study.baseline: Look(INK, MARKERS[0], DASHES[0])}
    for index, name in enumerate(others):
        look[name] = Look(
            COLOURS[index % len(COLOURS)],
            MARKERS[1 + index % (len(MARKERS) - 1)],
            DASHES[index // len(COLOURS) % len(DASHES)],
        )
    return {method.name: look[method.name] for method in study.methods}


def plain_log(axes: Axes, shown: Sequence[float]) -> None:
    """A vertical log axis for positive values, its labels plain numbers; as it was without any."""
    shown = [value for value in shown if 0 < value < math.inf]
    if not shown:
        return
    axes.set_yscale("log")
    axes.set_ylim(0.8 * min(shown), 1.25 * max(shown))
    if max(shown) > 4 * min(shown):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:  # too little of a decade for its 1, 2 and 5
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Axes, title: str, place: Place, columns: int = 1) -> None:
    """The legend of an axes, outside all of them."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, title=title, loc=place, ncols=columns, alignment="left")


def save(figure: Figure, kind: str) -> bytes:
    """The figure as a "png", "pdf" or "svg" file; equal figures give equal bytes.

    It is laid out when it is first saved, and not again.
    """
    buffer = BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            buffer, format=kind, dpi=200, metadata=NO_DATE[kind], transparent=kind == "svg"
        )
    figure.set_layout_engine(None)
    return buffer.getvalue()
