"""The ``gradagree`` command: its options, its help, and how it ends.

What a subcommand does is in :mod:`gradagree_opt.ablation.commands`, which is imported when one
runs: ``--help``, ``--version`` and the completion of a shell do not wait for PyTorch.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from gradagree_opt.stopping import ended_as_by_ctrl_c, status


@contextmanager
def explained() -> Iterator[None]:
    """Around an import: says in one sentence which package the command lacks, and how to mend it.

    Raises:
        ImportError: the error itself, where a module of this library is at fault.
        SystemExit: with the sentence.
    """
    try:
        yield
    except ImportError as error:
        if error.name and error.name.startswith("gradagree_opt"):
            raise
        if isinstance(error, ModuleNotFoundError):
            raise SystemExit(
                f"the gradagree command needs {error.name}: pip install 'gradagree-opt[ablation]', "
                "or pip install '.[ablation]' in a clone"
            ) from None
        reason = str(error).partition("\n")[0]
        raise SystemExit(
            f"the gradagree command cannot import what it needs: {reason}; "
            "`python -m gradagree_opt.doctor` names the package and how to mend it"
        ) from None


with explained():
    import typer

    from gradagree_opt.ablation.output import Command

ENDS = """\
Exit status: 0 if all went well; 1 if a run, a file or a package failed; 2 if an argument, a study
or a folder is not as it should be, and then nothing was done; 130 if you interrupted it, 143 if
SIGTERM ended it.
"""


class Engine(Enum):
    LOCAL = "local"
    RAY = "ray"


STUDIES = Path(__file__).parent / "ablation" / "studies"


def examples(*lines: str) -> str:
    """The end of a help page; an empty line keeps two commands apart."""
    return "\n\n".join(["Examples:", *lines])


app = typer.Typer(
    cls=Command,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="\n\n".join(
        [examples("gradagree ablate sine --quick", "gradagree doctor"), ENDS.replace("\n", " ")]
    ),
)


def show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"gradagree-opt {version('gradagree-opt')}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Compare aggregators of task gradients: run a study, report it, cite it."""


@contextmanager
def stopped_in_one_sentence() -> Iterator[None]:
    """Ctrl-C and SIGTERM while nothing is trained, as while packages are imported."""
    try:
        with ended_as_by_ctrl_c(signal.SIGTERM):
            yield
    except KeyboardInterrupt as stop:
        typer.echo(
            "stopped while nothing was being trained; the same command goes on from here", err=True
        )
        raise typer.Exit(status(stop)) from None


def list_studies(wanted: bool) -> bool:
    if wanted:
        with explained():
            from gradagree_opt.ablation import commands
        commands.list_studies()
        raise typer.Exit
    return wanted


def complete_study(incomplete: str) -> list[str]:
    """The shipped studies whose names begin so, for the completion of a shell."""
    return sorted(path.stem for path in STUDIES.glob(f"{incomplete}*.yaml"))


@app.command(
    epilog=examples(
        "gradagree ablate --list",
        "gradagree ablate sine --quick",
        "gradagree ablate sine --dry-run",
        "gradagree ablate sine --seeds 0-9 --iterations 2000 --out runs/ten-seeds",
        "gradagree ablate omniglot-5way-1shot --data omniglot.npz --device cuda",
        "gradagree ablate sine --engine ray --ray-address auto",
    )
)
def ablate(
    study: Annotated[
        str,
        typer.Argument(
            help="A shipped study, a study file, or a run's config.json.",
            autocompletion=complete_study,
        ),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Run the study's small form, in minutes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Output folder.", show_default="runs/<study>")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="For Omniglot, its .npz file or an existing folder to download to. For "
            "mini-ImageNet, its folder. For tasks of your own, what they read.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of processes; on a cluster, of groups of runs at a time.",
            show_default="all cores",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="auto (a GPU if there is one), cpu, cuda or cuda:1. On a GPU, one process does "
            "all runs.",
            show_default="the study's, which is auto unless it says otherwise",
        ),
    ] = None,
    checkpoint_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Save unfinished runs every so many seconds, to continue from there.",
            show_default="300",
        ),
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard",
            help="Also write TensorBoard event files, DIR/tensorboard/<method>/rate-…/seed-…, "
            "when a run ends or is found finished.",
        ),
    ] = False,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Use these seeds in place of the study's: 0,1,2 or 0-4.", show_default=False
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Use this number of outer steps in place of the study's.", show_default=False
        ),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="Train on this machine, or on a Ray cluster: one group of runs a core, or a GPU."
        ),
    ] = Engine.LOCAL,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="The cluster for --engine ray: auto, HOST:PORT or ray://HOST:PORT.",
            show_default="the one that Ray finds, or a new one of this machine",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say how many runs there are and how long they take."),
    ] = False,
    _list: Annotated[
        bool,
        typer.Option(
            "--list", callback=list_studies, is_eager=True, help="List the shipped studies."
        ),
    ] = False,
) -> None:
    """Run a study: every method at its own best outer rate, on the same tasks.

    If it is interrupted, run the same command again: it picks up where it left off.
    """
    with stopped_in_one_sentence():
        with explained():
            from gradagree_opt.ablation import commands
        commands.run_study(
            study,
            quick=quick,
            out=out,
            data=data,
            jobs=jobs,
            device=device,
            checkpoint_seconds=checkpoint_seconds,
            tensorboard=tensorboard,
            seeds=seeds,
            iterations=iterations,
            dry_run=dry_run,
            engine=engine.value,
            ray_address=ray_address,
        )


@app.command(
    epilog=examples(
        "gradagree report runs/sine", "gradagree report runs/sine runs/mine --out both.md"
    )
)
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="The output folder of a finished study, or several."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="With several folders: also write the table, as Markdown.", show_default=False
        ),
    ] = None,
) -> None:
    """Write the tables and figures of a study again from its recorded runs, without training.

    With several studies, show their methods in one table, on the same tasks and seeds.
    """
    with explained():
        from gradagree_opt.ablation import commands
    commands.write_report(folders, out)


@app.command(epilog=examples("gradagree doctor"))
def doctor() -> None:
    """Try every optional package once, and say how to mend what does not work.

    The exit status is 1 if something that is installed does not work.
    """
    from gradagree_opt.doctor import main as try_packages

    raise typer.Exit(try_packages())


@app.command(epilog=examples("gradagree cite runs/sine", "gradagree cite runs/sine > methods.md"))
def cite(
    folder: Annotated[Path, typer.Argument(help="The output folder of a study.")],
) -> None:
    """Print a paragraph for a paper's methods section, and BibTeX of exactly what was used."""
    with explained():
        from gradagree_opt.ablation import commands
    commands.print_citation(folder)
