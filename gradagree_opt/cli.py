"""The ``gradagree`` command."""

import shlex
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console

    from gradagree_opt.ablation.conduct import build_sweeps, foresee, prepare, usable_cores
    from gradagree_opt.ablation.report import layouts
    from gradagree_opt.ablation.report.artefacts import check_text, write_artefacts
    from gradagree_opt.ablation.report.beside import compare_folders
    from gradagree_opt.ablation.report.citations import bibtex, methods_text
    from gradagree_opt.ablation.report.display import Display
    from gradagree_opt.ablation.report.report import Report, build_report
    from gradagree_opt.ablation.runs.store import read_config, read_results
    from gradagree_opt.ablation.runs.sweep import CHECKPOINT_SECONDS
    from gradagree_opt.ablation.section import StudyError
    from gradagree_opt.ablation.study.loading import load, read, shipped
    from gradagree_opt.ablation.study.study import Study, named_device
    from gradagree_opt.ablation.training.run import RunRecord, write_atomically
    from gradagree_opt.doctor import main as try_packages
except ModuleNotFoundError as missing:
    if missing.name and missing.name.startswith("gradagree_opt"):
        raise
    raise SystemExit(
        f"the gradagree command needs {missing.name}: pip install 'gradagree-opt[ablation]', "
        "or pip install '.[ablation]' in a clone"
    ) from None
except ImportError as broken:
    if broken.name and broken.name.startswith("gradagree_opt"):
        raise
    reason = str(broken).partition("\n")[0]
    raise SystemExit(
        f"the gradagree command cannot import what it needs: {reason}; "
        "`python -m gradagree_opt.doctor` names the package and how to mend it"
    ) from None

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False)


def show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"gradagree-opt {version('gradagree-opt')}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Its version."),
    ] = False,
) -> None:
    """Gradient Agreement for meta-learning: ablation studies."""


def list_studies(wanted: bool) -> bool:
    if wanted:
        studies = shipped()
        width = max(map(len, studies))
        for name in studies:
            typer.echo(f"{name:{width}}  {read(studies[name])[0]['title']}")
        raise typer.Exit
    return wanted


def parse_seeds(text: str | None) -> list[int] | None:
    """The seeds of ``0,1,2`` or ``0-4``.

    Raises:
        StudyError: It is neither.
    """
    if text is None:
        return None
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise StudyError(f"expected --seeds as 0,1,2 or 0-4, found {text!r}")
        seeds += range(int(first), int(last if dash else first) + 1)
    return seeds


@app.command()
def ablate(
    study: Annotated[
        str, typer.Argument(help="A shipped study, a study file, or a run's config.json.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="The study's small form, in minutes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Output folder.", show_default="runs/<study>")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Omniglot: .npz, or a folder that is there, to download to. mini-ImageNet: its "
            "folder."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = usable_cores(),
    device: Annotated[
        str | None,
        typer.Option(
            help="auto (a GPU where there is one), cpu, cuda or cuda:1. A GPU does all runs in one "
            "process.",
            show_default="the study's, auto unless it says",
        ),
    ] = None,
    checkpoint_seconds: Annotated[
        float,
        typer.Option(min=0, help="After so many, unfinished runs are saved, to go on from there."),
    ] = CHECKPOINT_SECONDS,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard",
            help="Also write TensorBoard event files, DIR/tensorboard/<method>/rate-…/seed-…: a "
            "run's when it ends, or when it is found finished.",
        ),
    ] = False,
    seeds: Annotated[
        str | None, typer.Option(help="In place of the study's: 0,1,2 or 0-4.", show_default=False)
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="In place of the study's.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say how many runs there are, and how long they take."),
    ] = False,
    _list: Annotated[
        bool,
        typer.Option("--list", callback=list_studies, is_eager=True, help="The shipped studies."),
    ] = False,
) -> None:
    """Runs a study: every method at its own best outer rate, on the same tasks.

    Interrupted, the same command goes on with the runs that are missing.
    """
    try:
        write_events = event_writer() if tensorboard else None
        loaded = load(study, quick=quick, seeds=parse_seeds(seeds), iterations=iterations)
        loaded = on_device(loaded, device)
        folder = out or Path("runs") / loaded.name
        command = ["gradagree", *sys.argv[1:]]
        check_text([study, str(folder)])
        if dry_run:
            typer.echo(foresee(build_sweeps(loaded, folder, data, warn), jobs))
            return
        prepared = prepare(loaded, folder, data, command, warn, checkpoint_seconds)
    except StudyError as mistake:
        raise refusal(mistake) from None
    except OSError as failure:
        errors.print(f"gradagree: {failure}; nothing was run", markup=False)
        raise typer.Exit(1) from None
    try:
        display = Display(loaded.title, prepared.iterations, errors)

        def ended(part: Study, record: RunRecord, found: bool) -> None:
            display.end(part, record, found=found)
            display.resize(prepared.iterations)
            if write_events is not None:
                share = f"corrupted-{part.fraction:g}" if len(prepared.sweeps) > 1 else ""
                write_events(folder / "tensorboard" / share, part, record)

        with display.live():
            results = prepared.run(jobs, display.advance, ended)
    except (OSError, BrokenProcessPool, StudyError) as failure:
        errors.print(f"gradagree: {failure}; the finished runs are in {folder}", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print(
            f"stopped; the finished runs are in {folder}, {shlex.join(command)!r} goes on",
            markup=False,
        )
        raise typer.Exit(130) from None
    show(results.report, folder)


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="The output folder of a finished study, or several."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Of several folders: also write the table, as Markdown.")
    ] = None,
) -> None:
    """Writes the tables and figures of a study anew from its recorded runs; nothing is trained.

    Of several studies, shows their methods in one table, on the same tasks and seeds.
    """
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
        config = read_config(folder)
        found = build_report(read_results(folder, config))
        write_artefacts(folder, found, config)
    except StudyError as mistake:
        raise refusal(mistake) from None
    except OSError as failure:
        errors.print(f"gradagree: {failure}", markup=False)
        raise typer.Exit(1) from None
    show(found, folder)


@app.command()
def doctor() -> None:
    """Tries every optional package once, and says how to mend what does not work.

    Exit status 1 where something that is installed does not work.
    """
    raise typer.Exit(try_packages())


@app.command()
def cite(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of a study.")],
) -> None:
    """Prints a paragraph for a paper's methods section, and BibTeX of exactly what was used."""
    try:
        config = read_config(folder)
    except StudyError as mistake:
        raise refusal(mistake) from None
    try:
        read_results(folder, config)
    except StudyError as unfinished:
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
    """Tells a mistake of the user's; nothing was done."""
    errors.print(f"gradagree: {mistake}", markup=False)
    return typer.Exit(2)


def event_writer() -> Callable[[Path, Study, RunRecord], None]:
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
    console.print(layouts.terminal(report))
    if written is not None:
        console.print(f"written to {written}", markup=False, soft_wrap=True)
