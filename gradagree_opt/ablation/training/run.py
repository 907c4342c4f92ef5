"""Finished runs on disk: a JSON record and an .npz of parameters each, found again by content."""

import hashlib
import io
import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.devices import Hardware
from gradagree_opt.ablation.training.networks import Params
from gradagree_opt.replacing import replacing, unique_beside

LATER_KEYS: dict[str, dict[str, Any]] = {  # than the first records
    "tasks": {"split": "vinyals", "rotations": False, "folds": None},
    "model": {"batch_norm": False, "network": None},
    "inner": {"optimizer": "sgd", "betas": None},
}
FORMAT = 1  # raise it when the same study would give other numbers


def number(score: float) -> float:
    """The score, unless it is NaN: a run that diverged has an infinite one."""
    if math.isnan(score):
        raise ValueError("expected a number or infinity, found NaN")
    return score


Score: TypeAlias = Annotated[float, AfterValidator(number)]


class Run(BaseModel):
    """One training: a method at one outer rate from one seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method
    rate: float
    seed: int

    @property
    def label(self) -> tuple[str, float, int]:
        """What tells it from the other runs of its study."""
        return self.method.name, self.rate, self.seed

    def key(self, study: Study, data: str | None) -> str:
        """A hash of everything that determines the result, and of nothing else.

        A method's name, the other methods, rates and seeds are not part of it: a study can grow
        without its finished runs being done again. A study that decides by itself whether to
        compile has the keys of one that does not.
        """
        content = study.model_dump(
            mode="json",
            include={
                "tasks": True,
                "model": True,
                "form": True,
                "inner": True,
                "outer": {"optimizer", "schedule"},
                "iterations": True,
                "meta_batch": True,
                "tuning": {"tasks", "steps"},
                "test": True,
                "corruption": True,
            },
        )
        # Keys later than the first records, absent from theirs.
        if study.corruption is None:
            del content["corruption"]
        if study.test.transductive:
            del content["test"]["transductive"]
        if content["model"].get("network") == study.usual_network:
            content["model"]["network"] = None
        for section, later in LATER_KEYS.items():
            for key, default in later.items():
                if content[section] and content[section].get(key, ...) == default:
                    del content[section][key]
        content |= self.model_dump(mode="json", exclude={"method": {"name", "rates", "outer"}})
        content["outer"]["optimizer"] = study.optimizer(self.method)
        content |= {"compile": study.compile is True}
        content |= {"format": FORMAT, "data": data}
        if code := study.code_of(self.method):
            content["code"] = code
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


class CurvePoint(BaseModel):
    """The validation loss, and the diagnostics of the batch, after some outer steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    iteration: int
    loss: float
    diagnostics: dict[str, float]


class RunRecord(BaseModel):
    """What a run found. Losses and scores of a run that diverged are infinite.

    Attributes:
        agreement: Cosines between the displacements of the tasks of one training batch, by the
            trained parameters; None for a run that diverged, and in records older than this.
        hardware: What it was trained on; None in records older than this, which are of CPUs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    run: Run
    validation: Score
    test: dict[int, Score]
    curve: Annotated[list[CurvePoint], Field(min_length=1)]
    agreement: list[list[float]] | None = None
    hardware: Hardware | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    def is_of(self, run: Run, study: Study) -> bool:
        """Whether it is what the run would leave: no other one, by another name of its file.

        A method may have been renamed since, and its rates and its optimizer may stand elsewhere.
        """
        renamed = {"name", "rates", "outer"}
        mine, wanted = (each.model_dump(exclude={"method": renamed}) for each in (self.run, run))
        rows = self.agreement or []
        return (
            mine == wanted
            and list(self.test) == study.test.steps
            and all(len(row) == len(rows) == study.meta_batch for row in rows)
        )


class Store:
    """The records of an output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs"

    def read(self, run: Run, study: Study, data: str | None) -> RunRecord | None:
        """A finished run, whose parameters may have been thrown away, or None if there is none.

        Args:
            data: As :meth:`Run.key` takes it.

        Raises:
            DamagedRecordError: The record cannot be read, or is not of this run.
        """
        path = self.folder / f"{run.key(study, data)}.json"
        try:
            record = RunRecord.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise DamagedRecordError(f"{path} is cut off or no record; redoing its run") from None
        if not record.is_of(run, study):
            raise DamagedRecordError(f"{path} is not the record of its run; redoing that run")
        return record.model_copy(update={"run": run})  # the method may have been renamed

    def write(self, key: str, record: RunRecord, params: bytes) -> None:
        """Parameters, as :func:`archive` gives them, first: what has a record is finished."""
        write_atomically(self.folder / f"{key}.npz", params)
        write_atomically(self.folder / f"{key}.json", record.model_dump_json().encode())

    def params(self, key: str) -> Params | None:
        """A run's trained parameters, or None if they are not kept, damaged or pickled."""
        path = self.folder / f"{key}.npz"
        if not zipfile.is_zipfile(path):
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return nested({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        except (ValueError, EOFError, OSError, RuntimeError, zlib.error, zipfile.BadZipFile):
            return None


class DamagedRecordError(Exception):
    """A record that cannot be read."""


def archive(params: Params) -> bytes:
    """The ``.npz`` file of a run's parameters."""
    buffer = io.BytesIO()
    arrays: Any = {name: leaf.detach().numpy() for name, leaf in flat(params).items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def flat(params: Params) -> dict[str, Tensor]:
    """The leaves by name, those of a part as "part/name"."""
    leaves: dict[str, Tensor] = {}
    for name, leaf in params.items():
        is_part = isinstance(leaf, dict)
        leaves |= {f"{name}/{inner}": leaf[inner] for inner in leaf} if is_part else {name: leaf}
    return leaves


def nested(leaves: dict[str, Tensor]) -> Params:
    """The parameters whose leaves :func:`flat` has named."""
    params: Params = {}
    for name, leaf in leaves.items():
        part, slash, inner = name.partition("/")
        if slash:
            params.setdefault(part, {})[inner] = leaf
        else:
            params[name] = leaf
    return params


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file in one step: whoever reads it sees all of the old one or all of the new."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_first(path: Path, content: bytes) -> None:
    """Writes the file unless there is one: of processes that begin together, one does."""
    own = unique_beside(path)
    try:
        write_atomically(own, content)
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:
        if not own.exists():
            raise
        own.replace(path)  # a file system without hard links
    finally:
        own.unlink(missing_ok=True)
