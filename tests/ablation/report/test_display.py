"""The display of a running study: the best of each method so far, in eighty columns."""

import io
import math
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from gradagree_opt.ablation.report.display import Display
from gradagree_opt.ablation.study.sections import CorruptionSection
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import CurvePoint, Run, RunRecord


def record(study: Study, place: int, rate: float, seed: int, loss: float) -> RunRecord:
    run = Run(method=study.methods[place], rate=rate, seed=seed)
    return RunRecord(
        run=run,
        validation=loss,
        test={1: 0.0},
        curve=[CurvePoint(iteration=0, loss=loss, diagnostics={})],
        seconds=0.0,
    )


def shown(display: Display) -> list[str]:
    """The lines so far, those of the display as it is now the last of them."""
    display.console.print(display)
    return printed(display)


def printed(display: Display) -> list[str]:
    assert isinstance(display.console.file, io.StringIO)
    return [line.rstrip() for line in display.console.file.getvalue().splitlines()]


def console(*, terminal: bool, get_time: Callable[[], float] = time.monotonic) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        color_system=None,
        width=80,
        height=24,
        get_time=get_time,
    )


def test_the_lowest_validation_loss_of_each_method_is_shown_with_its_rate(study: Study) -> None:
    display = Display("A [bold]title", 100, console(terminal=True))
    for rate, seed, loss in ((0.25, 3, 2.5), (0.5, 3, 1.25), (0.5, 5, 1.75)):
        display.end(study, record(study, 0, rate, seed, loss), found=False)
    display.end(study, record(study, 1, 0.25, 3, math.inf), found=False)
    title, _, *table = shown(display)
    assert title == "A [bold]title"
    assert [line.split() for line in table] == [
        ["method", "lowest", "validation", "loss", "outer", "rate", "runs"],
        ["mean", "1.25", "0.5", "3", "of", "3"],
        ["agreement", "diverged", "0.25", "1", "of", "3"],
        ["random_weights", "&", "co", "0", "of", "3"],
    ]


def test_a_rate_that_is_tried_beyond_an_edge_is_one_run_more(study: Study) -> None:
    outer = study.outer.model_copy(update={"extend": 1})
    study = study.model_copy(update={"outer": outer})
    display = Display("title", 100, console(terminal=True))
    display.advance(50)
    for rate, loss in ((0.25, 2.5), (0.5, 1.25)):
        display.end(study, record(study, 0, rate, 3, loss), found=False)
    display.resize(200)
    _, bar, _, *methods = shown(display)
    assert " 25 % " in bar
    assert [line.split()[-3:] for line in methods[:2]] == [["2", "of", "4"], ["0", "of", "3"]]


def test_the_next_fraction_begins_anew(study: Study) -> None:
    corruption = CorruptionSection(kind="shuffled_labels", fraction=[0, 0.3])
    clean, spoilt = study.model_copy(update={"corruption": corruption}).parts()
    display = Display("", 100, console(terminal=True))
    display.end(clean, record(study, 0, 0.25, 3, 1.0), found=False)
    display.end(spoilt, record(study, 0, 0.5, 3, 7.0), found=False)
    heading, mean = shown(display)[2:4]
    assert heading.startswith("method, 30 % corrupted")
    assert mean.split() == ["mean", "7", "0.5", "1", "of", "3"]


@pytest.mark.parametrize("length", [10, 200])
def test_it_fits_eighty_columns_a_line_a_method(study: Study, length: int) -> None:
    methods = [m.model_copy(update={"name": m.name[:1] * length}) for m in study.methods]
    study = study.model_copy(update={"methods": methods})
    display = Display("title", 10**9, console(terminal=True))
    display.end(study, record(study, 0, 0.25, 3, 1.23456789e-5), found=False)
    lines = shown(display)
    assert len(lines) == 2 + 1 + 3 and max(map(len, lines)) <= 80
    assert "1.235e-05" in lines[3] and "1 of 3" in lines[3]


def test_a_pipe_is_told_how_far_it_is_while_it_runs_in_plain_lines(study: Study) -> None:
    display = Display("A [bold]title", 200, console(terminal=False))
    lines = []
    with display.live():
        for steps in (9, 1, 5, 100, 85):
            display.advance(steps)
            display.end(study, record(study, 0, 0.25, 3, 1.0), found=False)
            lines.append(len(printed(display)))
    assert lines == [1, 2, 2, 3, 4]
    title, *bars = printed(display)
    assert title == "A [bold]title"
    for percent, bar in zip((5, 57, 100), bars, strict=True):
        assert f" {percent} % " in bar and "\x1b" not in bar


def test_finished_runs_are_counted_and_do_not_shorten_the_time_left(study: Study) -> None:
    now = 0.0
    study = study.model_copy(update={"iterations": 12})
    clock = console(terminal=True, get_time=lambda: now)
    display = Display("title", 9 * study.iterations, clock)
    for seed in range(5):
        now += 0.001
        display.end(study, record(study, 0, 0.25, seed, 1.0), found=True)
    for _ in range(study.iterations):
        now += 10.0
        display.advance(1)
    assert " 67 % 0:02:00 so far, 0:06:00 left" in shown(display)[1]
    display.end(study, record(study, 1, 0.25, 3, 1.0), found=True)
    for _ in range(study.iterations):
        now += 10.0
        display.advance(1)
    assert " 89 % 0:04:00 so far, 0:02:00 left" in shown(display)[-5]
