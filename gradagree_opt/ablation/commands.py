"""What each subcommand of ``gradagree`` does, apart from reading its command line."""

import re
import reprlib
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import typer
from rich.console import Console

from gradagree_opt.ablation.conduct import (
    Prepared,
    Results,
    build_sweeps,
    connected,
    foresee,
    prepare,
)
from gradagree_opt.ablation.report import layouts
from gradagree_opt.ablation.report.artefacts import check_text, write_artefacts
from gradagree_opt.ablation.report.beside import compare_folders
from gradagree_opt.ablation.report.citations import bibtex, methods_text
from gradagree_opt.ablation.report.display import errors
from gradagree_opt.ablation.report.report import Report, build_report
from gradagree_opt.ablation.runs.store import one_writer, read_config, read_results
from gradagree_opt.ablation.runs.sweep import CHECKPOINT_SECONDS
from gradagree_opt.ablation.section import MOST_SEEDS, StudyError
from gradagree_opt.ablation.study.loading import load, read, shipped
from gradagree_opt.ablation.study.study import Study, named_device
from gradagree_opt.ablation.training.run import RunRecord, write_atomically
from gradagree_opt.stopping import status

EventWriter: TypeAlias = Callable[[Path, Study, RunRecord], None]

NARROWEST = 40
"""Characters in a line of a table; a narrower terminal breaks the lines."""


def list_studies() -> None:
    """Prints the name and the title of every study that ships."""
    studies = shipped()
    width = max(map(len, studies))
    for name in studies:
        typer.echo(f"{name:{width}}  {read(studies[name])[0]['title']}")


def parse_seeds(text: str | None) -> list[int] | None:
    """The seeds of ``0,1,2`` or ``0-4``.

    Raises:
        StudyError: It is neither.
    """
    if text is None:
        return None
    seeds: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?", part)
        if ends is None:
            raise StudyError(f"expected --seeds as 0,1,2 or 0-4, found {reprlib.repr(text)}")
        found = range(int(ends[1]), int(ends[2] or ends[1]) + 1)
        if not found:
            raise StudyError(f"expected --seeds that rise, as 0-4, found {part!r}")
        if (count := len(seeds) + found.stop - found.start) > MOST_SEEDS:
            raise StudyError(f"expected at most {MOST_SEEDS} --seeds, found {count}")
        seeds += found
    return seeds


def run_study(
    study: str,
    *,
    quick: bool,
    out: Path | None,
    data: Path | None,
    jobs: int | None,
    device: str | None,
    checkpoint_seconds: float | None,
    tensorboard: bool,
    seeds: str | None,
    iterations: int | None,
    dry_run: bool,
    engine: str,
    ray_address: str | None,
) -> None:
    """Runs a study and shows its table; under ``dry_run``, only says how long that would take."""
    every = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
    command = ["gradagree", *sys.argv[1:]]
    with ExitStack() as opened:
        try:
            write_events = event_writer() if tensorboard else None
            loaded = load(study, quick=quick, seeds=parse_seeds(seeds), iterations=iterations)
            loaded = on_device(loaded, device)
            folder = out or Path("runs") / loaded.name
            check_text([study, str(folder)])
            cluster = opened.enter_context(connected(engine, ray_address, jobs))
            if dry_run:
                sweeps = build_sweeps(loaded, folder, data, warn, cluster=cluster)
                typer.echo(foresee(sweeps, jobs))
                return
            prepared = prepare(loaded, folder, data, command, warn, every, cluster)
        except StudyError as mistake:
            raise refusal(mistake) from None
        except OSError as failure:
            errors.print(f"gradagree: {failure}; nothing was run", markup=False)
            raise typer.Exit(1) from None
        show(run_prepared(prepared, jobs, write_events, command).report, folder)


def run_prepared(
    prepared: Prepared, jobs: int | None, write_events: EventWriter | None, command: list[str]
) -> Results:
    """Runs what is missing of a study and displays how far it is."""
    folder = prepared.folder

    def ended(part: Study, record: RunRecord, _: bool) -> None:
        if write_events is not None:
            share = f"corrupted-{part.fraction:g}" if len(prepared.sweeps) > 1 else ""
            write_events(folder / "tensorboard" / share, part, record)

    try:
        return prepared.run_displayed(jobs, ended)
    except (OSError, StudyError) as failure:
        errors.print(f"gradagree: {failure}; the finished runs are in {folder}", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        errors.print(
            f"stopped; the finished runs are in {folder}; run {shlex.join(command)!r} again: "
            "it picks up where it left off",
            markup=False,
        )
        raise typer.Exit(status(stop)) from None


def write_report(folders: list[Path], out: Path | None) -> None:
    """Writes the tables, figures and page of a study again, or shows several in one table."""
    try:
        check_text(list(map(str, folders)))
        if len(folders) > 1:
            beside = compare_folders(folders)
            if out is not None:
                write_atomically(out, layouts.markdown(beside).encode())
            show(beside, out)
            return
        if out is not None:
            raise StudyError("--out is for several folders; one is written to itself")
        [folder] = folders
        with one_writer(folder):
            config = read_config(folder)
            found = build_report(read_results(folder, config))
            write_artefacts(folder, found, config)
    except StudyError as mistake:
        raise refusal(mistake) from None
    except OSError as failure:
        errors.print(f"gradagree: {failure}", markup=False)
        raise typer.Exit(1) from None
    show(found, folder)


def print_citation(folder: Path) -> None:
    """Prints the methods paragraph and the BibTeX of a study."""
    try:
        config = read_config(folder)
    except StudyError as mistake:
        raise refusal(mistake) from None
    try:
        read_results(folder, config)
    except (OSError, StudyError) as unfinished:
        warn(f"this text is of the finished study: {unfinished}")
    typer.echo(methods_text(config))
    typer.echo(bibtex(config), nl=False)


def on_device(study: Study, name: str | None) -> Study:
    """The study on the device that the command names, where it names one.

    Raises:
        StudyError: That is not how a device is named.
    """
    if name is None:
        return study
    try:
        return study.model_copy(update={"device": named_device(name)})
    except ValueError as mistake:
        raise StudyError(f"--device: {mistake}") from None


def refusal(mistake: StudyError) -> typer.Exit:
    """Prints a mistake of the user's; nothing was done."""
    errors.print(f"gradagree: {mistake}", markup=False)
    return typer.Exit(2)


def event_writer() -> EventWriter:
    """What writes TensorBoard's files.

    Raises:
        StudyError: TensorBoard is not installed; the sentence has the command that does it.
    """
    try:
        from gradagree_opt.ablation.report.event_files import write_events
    except ImportError as missing:
        raise StudyError(f"--tensorboard: {missing}") from None
    return write_events


def warn(sentence: str) -> None:
    errors.print(sentence, markup=False)


def show(report: Report, written: Path | None) -> None:
    """Prints the table, and where all of it is written."""
    console = Console()
    console.width = max(console.width, NARROWEST)
    console.print(layouts.terminal(report))
    if written is not None:
        console.print(f"written to {written}", markup=False, soft_wrap=True)
