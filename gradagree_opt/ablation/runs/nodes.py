"""What is done on a node of a cluster: it is compared with where the study began, and used."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gradagree_opt.ablation.runs.job import Found, Task, Tell, perform, prepared
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.devices import Hardware, describe
from gradagree_opt.ablation.training.grouping import compiler_failure
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.ablation.training.side_by_side import runs_at_once


@dataclass(frozen=True)
class Home:
    """What a node has to have in common with the machine that a study is started on.

    Attributes:
        folder: The current one, in which modules of the user's own are found.
        versions: Of the packages that the numbers depend on; None for one that is missing.
    """

    folder: Path
    versions: dict[str, str | None]

    @classmethod
    def of(cls, study: Study) -> "Home":
        names = ["gradagree-opt", "torch"]
        names += ["torchjd"] * any(method.of_torchjd for method in study.methods)
        return cls(Path.cwd(), {name: installed(name) for name in names})


@dataclass(frozen=True)
class Node:
    """What a node is to a study.

    Attributes:
        at_once: How many runs its GPU holds at a time, None on a CPU.
    """

    hardware: Hardware
    at_once: int | None


def installed(package: str) -> str | None:
    """Its version, None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def look_around(home: Home, job: bytes, run: Run) -> Node:
    """Prepares a pickled job on a node.

    Args:
        run: One of the job's.

    Raises:
        StudyError: It has other versions, data or modules, or lacks a compiler.
    """
    with arrived(home):
        found, problem = prepared(job)
        if found.study.with_code() != found.study:
            raise StudyError(
                "expected the modules that the study names as they are where it was started, found "
                f"others; share the folder {home.folder}"
            )
        if found.compiled and (failure := compiler_there()):
            raise StudyError(
                f"expected a C++ compiler as where the study was started, found {failure}; install "
                "one, as g++, with Python's headers, or give the study compile: false"
            )
        hardware = describe(found.device, found.study.tf32)
        return Node(hardware, runs_at_once(found.study, problem, run))


def perform_there(home: Home, job: bytes, task: Task, tell: Tell) -> Found:
    """A group of runs, on whichever node it has come to: one may have joined since."""
    with arrived(home):
        return perform(job, task, tell)


@cache
def compiler_there() -> str | None:
    return compiler_failure()


@contextmanager
def arrived(home: Home) -> Iterator[None]:
    """In the study's folder, where the node has one of that name; mistakes name the node."""
    from ray.util import get_node_ip_address

    with suppress(OSError):
        os.chdir(home.folder)
    try:
        compare(home.versions, {name: installed(name) for name in home.versions})
        yield
    except StudyError as mistake:
        raise of_node(socket.gethostname(), get_node_ip_address(), mistake) from None


def of_node(name: str, address: str, mistake: StudyError) -> StudyError:
    return StudyError(f"the node {name} ({address}): {mistake}")


def compare(home: dict[str, str | None], there: dict[str, str | None]) -> None:
    """Raises a StudyError where a version is another one."""
    for name, here in home.items():
        if there[name] != here:
            raise StudyError(
                f"expected {name} {here} as where the study was started, found "
                f"{there[name] or 'none'}; install the same version on both"
            )
