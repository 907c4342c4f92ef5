"""What a group of runs goes on from after its process was killed: a file beside the records."""

import hashlib
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from gradagree_opt.replacing import replacing

State: TypeAlias = dict[str, Any]
Run = TypeVar("Run")
DAMAGES = (EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError, pickle.PickleError)
"""What reading a file that is cut off, or none of ours, may raise."""


class Checkpoint:
    """The file of one group of runs.

    Args:
        keys: Of the runs, in their order.
        circumstances: What the bits depend on besides; a state from others is not gone on from.
        seconds: That pass before a state is due, from one to the next.
    """

    def __init__(
        self, folder: Path, keys: Sequence[str], circumstances: str, seconds: float
    ) -> None:
        name = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:20]
        self.path = folder / f"{name}.pt"
        self.keys, self.circumstances = list(keys), circumstances
        self.seconds = seconds
        self.before = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self.before >= self.seconds

    def write(self, state: State) -> None:
        """Replaces the file in one step.

        Args:
            state: Tensors, numbers, texts and None, in lists and dicts.
        """
        content = {"keys": self.keys, "circumstances": self.circumstances, "state": state}
        with replacing(self.path) as temporary:
            torch.save(content, temporary)
        self.before = time.monotonic()

    def read(self) -> State | None:
        """What was written last, by a process under the same circumstances; else None."""
        content = read(self.path)
        if (content.get("keys"), content.get("circumstances")) != (self.keys, self.circumstances):
            return None
        state: State = content["state"]
        return state

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Checkpoints:
    """Those of an output folder.

    Args:
        circumstances, seconds: As for :class:`Checkpoint`.
    """

    folder: Path
    circumstances: str
    seconds: float

    def of(self, keys: Sequence[str]) -> Checkpoint:
        return Checkpoint(self.folder, keys, self.circumstances, self.seconds)

    def begun(self, missing: Mapping[str, Run]) -> list[list[Run]]:
        """The groups among the missing runs, by key, that a checkpoint goes on with.

        The checkpoint of a group of which a run is recorded is old, and removed.
        """
        groups: list[list[Run]] = []
        for path in sorted(self.folder.glob("*.pt")):
            content = read(path)
            keys = content.get("keys", [])
            if any((self.folder / f"{key}.json").exists() for key in keys):
                path.unlink(missing_ok=True)
            elif keys and content["circumstances"] == self.circumstances:
                found = [missing[key] for key in keys if key in missing]
                if len(found) == len(keys):
                    groups.append(found)
        return groups


def read(path: Path) -> State:
    """The content of a checkpoint, empty where it is absent or damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGES:
        return {}
    return content if isinstance(content, dict) else {}
