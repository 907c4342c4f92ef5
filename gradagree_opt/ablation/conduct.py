"""A study from its file to its report: what the command and Python have in common."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from gradagree_opt.ablation.own import told
from gradagree_opt.ablation.report.artefacts import (
    check_text,
    encoded,
    other_versions,
    prepare_folder,
    write_artefacts,
    write_config,
)
from gradagree_opt.ablation.report.display import Display, errors
from gradagree_opt.ablation.report.report import Report, build_report
from gradagree_opt.ablation.report.tables import counted
from gradagree_opt.ablation.runs.expected import TIMED_STEPS, duration, expect
from gradagree_opt.ablation.runs.store import CONFIG, Config, one_writer
from gradagree_opt.ablation.runs.sweep import CHECKPOINT_SECONDS, Ended, Sweep
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.devices import choose_device
from gradagree_opt.ablation.training.grouping import compiles, is_compiled
from gradagree_opt.ablation.training.run import RunRecord, write_atomically
from gradagree_opt.engines.errors import is_out_of_memory
from gradagree_opt.options import check_choice

if TYPE_CHECKING:
    from gradagree_opt.ablation.runs.cluster import Cluster

MOST_JOBS = 1000


@dataclass(frozen=True)
class Results:
    """What a study found.

    Attributes:
        folder: Where the runs, tables, figures and ``report.html`` are.
        report: The tables, computed from the runs of each part of the study.
        config: The study as it was run, and what it ran on.
    """

    folder: Path
    report: Report = field(repr=False)
    config: Config = field(repr=False)

    @property
    def runs(self) -> pd.DataFrame:
        """Every run, tuning and final: one row for each number of gradient steps at the test."""
        return self.report.runs

    @property
    def table(self) -> pd.DataFrame:
        """The methods, the best first: means, intervals, differences and tests as numbers."""
        return self.report.numbers


@dataclass(frozen=True)
class Prepared:
    """A study whose data are read and whose folder is its own; nothing is trained yet."""

    study: Study
    folder: Path
    config: Config
    sweeps: list[Sweep]

    @property
    def iterations(self) -> int:
        """The outer steps of all its runs, as far as is known."""
        return sum(sweep.iterations for sweep in self.sweeps)

    def run(
        self,
        jobs: int | None,
        advance: Callable[[int], None] = lambda _: None,
        ended: Ended = lambda *_: None,
    ) -> Results:
        """Does what is missing, and writes tables, figures and page.

        Args:
            jobs: As :func:`count_jobs` takes it.
            advance: Called with numbers of outer steps, as they are done.
            ended: Called for each run, as it ends or is found finished.
        """
        count = count_jobs(jobs, self.sweeps[0])
        with within_memory():
            parts = [sweep.run(count, advance, ended) for sweep in self.sweeps]
        report = build_report(parts)
        with one_writer(self.folder):
            # By now that of another process may be there, which began with other seeds.
            write_atomically(self.folder / CONFIG, encoded(self.config))
            write_artefacts(self.folder, report, self.config)
        return Results(self.folder, report, self.config)

    def run_displayed(self, jobs: int | None, ended: Ended = lambda *_: None) -> Results:
        """:meth:`run`, which shows on standard error how far it is."""
        display = Display(self.study.title, self.iterations, errors)

        def shown(part: Study, record: RunRecord, found: bool) -> None:
            display.end(part, record, found=found)
            display.resize(self.iterations)
            ended(part, record, found)

        with display.live():
            return self.run(jobs, display.advance, shown)


def build_sweeps(
    study: Study,
    folder: Path,
    data: Path | None,
    warn: Callable[[str], None],
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    cluster: "Cluster | None" = None,
) -> list[Sweep]:
    """The parts of the study with their data, on its device; nothing is trained or written.

    Raises:
        StudyError: The data, a package or the user's own code is not as it should be.
    """
    choose = choose_device if cluster is None else cluster.choose_device
    place = choose(study.device)
    with within_memory():
        return [
            Sweep(part, folder, data, warn, place, checkpoint_seconds, cluster)
            for part in study.with_code().parts()
        ]


@contextmanager
def within_memory() -> Iterator[None]:
    """Raises a StudyError where what is done in it finds no memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise StudyError(
            f"expected a study that fits into memory, found {told(error)}; give it a smaller "
            "network, fewer tasks or examples, or fewer jobs"
        ) from error


def foresee(sweeps: Sequence[Sweep], jobs: int | None) -> str:
    """How many runs a study has, and how long the missing ones take, in sentences."""
    found = expect(sweeps)
    missing = found.runs - found.finished
    text = f"{counted(found.runs, 'run')}, of which {found.finished} are finished"
    if found.most_added:
        text += f"; up to {found.most_added} more, if the best rate is at an edge"
    if not missing:
        return f"{text}."
    used = min(count_jobs(jobs, sweeps[0]), missing)
    compiled = bool(found.timed) and any(is_compiled(sweep.study) for sweep in sweeps)
    text += f". The others take {'at most ' * compiled}about {duration(found.seconds / used)} "
    text += f"with {counted(used, 'process', 'processes')}, "
    if not found.timed:
        return f"{text}as those did."
    text += f"by {TIMED_STEPS} timed steps of {', '.join(found.timed)}"
    return text + "; compiled, as they will be, steps are several times faster" * compiled + "."


def prepare(
    study: Study,
    folder: Path,
    data: Path | None,
    command: Sequence[str],
    warn: Callable[[str], None],
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    cluster: "Cluster | None" = None,
) -> Prepared:
    """Everything that can refuse a study, done before anything is trained or written.

    Args:
        command: What does the same again.
        warn: Called with one sentence for each thing to know.
        checkpoint_seconds: After so many, unfinished runs are saved.
        cluster: Where they are trained; None for this machine.

    Raises:
        StudyError: The data, a package, the user's own code, the folder or a node of the cluster is
            not as it should be.
        OSError: The folder cannot be written to after all.
    """
    check_text([*command, str(folder), str(data)])
    study = study.with_code()
    sweeps = build_sweeps(study, folder, data, warn, checkpoint_seconds, cluster)
    compiled = compiles(study, warn, sweeps[0].device)
    for sweep in sweeps:
        sweep.compiled = compiled
    names = {node.hardware.name for sweep in sweeps for node in sweep.nodes}
    if len(names) > 1:
        warn(
            f"the nodes have {' and '.join(sorted(names))}: their results differ by rounding; each "
            "record says which it is of, and the methods text names one"
        )
    hardware = sweeps[0].nodes[0].hardware
    prepare_folder(folder, study)
    if sentence := other_versions(folder, study, hardware):
        warn(sentence)
    digests = [sweep.digest for sweep in sweeps]
    config = write_config(folder, study, list(command), data, digests, hardware)
    return Prepared(study, folder, config, sweeps)


@contextmanager
def connected(engine: str, address: str | None, jobs: int | None) -> "Iterator[Cluster | None]":
    """The cluster that the study runs on while the context lasts; None for this machine.

    Args:
        engine: "local" or "ray".
        address: Of the cluster, as for ``ray.init``.
        jobs: As for :func:`count_jobs`.

    Raises:
        StudyError: It is neither, or no cluster answers, or Ray is not installed; or there are more
            jobs than any machine has room for.
    """
    if jobs is not None and jobs > MOST_JOBS:
        raise StudyError(f"expected --jobs to be at most {MOST_JOBS}, found {jobs}; leave it out")
    try:
        check_choice("the engine", engine, ("local", "ray"))
    except ValueError as mistake:
        raise StudyError(str(mistake)) from None
    if engine == "local":
        if address is not None:
            raise StudyError(f"the Ray address {address!r} is for the engine ray; give both")
        yield None
        return
    try:
        from gradagree_opt.ablation.runs.cluster import Cluster
    except ImportError as missing:
        extra = "pip install 'gradagree-opt[ray]'"
        raise StudyError(f"the engine ray: {missing}, or with: {extra}") from None
    with Cluster(address, jobs) as cluster:
        yield cluster


def count_jobs(jobs: int | None, sweep: Sweep) -> int:
    """How many groups of runs are trained at a time; None for as many as there is room for."""
    if sweep.cluster is not None:
        return sweep.cluster.slots(sweep.device)
    return usable_cores() if jobs is None else jobs


def usable_cores() -> int:
    """Those that this process may run on, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
