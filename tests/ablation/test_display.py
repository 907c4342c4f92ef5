"""The display of a running study: the best of each method so far, in eighty columns."""

import io
import math

import pytest
from rich.console import Console

from gradagree_opt.ablation.display import Display
from gradagree_opt.ablation.records import Run, RunRecord
from gradagree_opt.ablation.study import CorruptionSection, Study


def record(study: Study, place: int, rate: float, seed: int, loss: float) -> RunRecord:
    run = Run(method=study.methods[place], rate=rate, seed=seed)
    return RunRecord(run=run, validation=loss, test={1: 0.0}, curve=[], seconds=0.0)


def shown(display: Display) -> list[str]:
    display.console.print(display)
    assert isinstance(display.console.file, io.StringIO)
    text = display.console.file.getvalue()
    display.console.file.truncate(0)
    return [line.rstrip() for line in text.splitlines()]


def console(*, terminal: bool) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, color_system=None, width=80, height=24
    )


def test_the_lowest_validation_loss_of_each_method_is_shown_with_its_rate(study: Study) -> None:
    display = Display("A [bold]title", 100, console(terminal=True))
    for rate, seed, loss in ((0.25, 3, 2.5), (0.5, 3, 1.25), (0.5, 5, 1.75)):
        display.end(study, record(study, 0, rate, seed, loss))
    display.end(study, record(study, 1, 0.25, 3, math.inf))
    title, _, *table = shown(display)
    assert title == "A [bold]title"
    assert [line.split() for line in table] == [
        ["method", "lowest", "validation", "loss", "outer", "rate", "runs"],
        ["mean", "1.25", "0.5", "3", "of", "3"],
        ["agreement", "diverged", "0.25", "1", "of", "3"],
        ["random_weights", "&", "co", "0", "of", "3"],
    ]


def test_the_next_fraction_begins_anew(study: Study) -> None:
    corruption = CorruptionSection(kind="shuffled_labels", fraction=[0, 0.3])
    clean, spoilt = study.model_copy(update={"corruption": corruption}).parts()
    display = Display("", 100, console(terminal=True))
    display.end(clean, record(study, 0, 0.25, 3, 1.0))
    display.end(spoilt, record(study, 0, 0.5, 3, 7.0))
    heading, mean = shown(display)[2:4]
    assert heading.startswith("method, 30 % corrupted")
    assert mean.split() == ["mean", "7", "0.5", "1", "of", "3"]


@pytest.mark.parametrize("length", [10, 200])
def test_it_fits_eighty_columns_a_line_a_method(study: Study, length: int) -> None:
    methods = [m.model_copy(update={"name": m.name[:1] * length}) for m in study.methods]
    study = study.model_copy(update={"methods": methods})
    display = Display("title", 10**9, console(terminal=True))
    display.end(study, record(study, 0, 0.25, 3, 1.23456789e-5))
    lines = shown(display)
    assert len(lines) == 2 + 1 + 3 and max(map(len, lines)) <= 80
    assert "1.235e-05" in lines[3] and "1 of 3" in lines[3]


def test_a_pipe_is_told_how_far_it_is_in_plain_lines(study: Study) -> None:
    display = Display("title", 10, console(terminal=False))
    display.advance(5)
    display.end(study, record(study, 0, 0.25, 3, 1.0))
    title, bar, rest = shown(display)
    assert title == "title" and "50 %" in bar and "\x1b" not in bar
    assert rest == ""  # what is told next has a line of its own
