"""Checkpoints, from which a group of runs is resumed after its process was killed."""

import hashlib
import io
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from gradagree_opt.replacing import replacing

State: TypeAlias = dict[str, Any]
Run = TypeVar("Run")
DAMAGES = (EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError, pickle.PickleError)
"""What reading a state that is cut off, or none of ours, may raise."""


class States:
    """Saves the state of a group of runs now and then, and reads what it is resumed from.

    Args:
        keys: Of the runs, in their order.
        circumstances: What the bits depend on besides; a state saved under others is not used.
        seconds: From one state to the next.
    """

    def __init__(self, keys: Sequence[str], circumstances: str, seconds: float) -> None:
        self.keys, self.circumstances = list(keys), circumstances
        self.seconds = seconds
        self.before = time.monotonic()

    def load(self) -> bytes | None:
        """The content that was kept last."""
        raise NotImplementedError

    def keep(self, content: bytes) -> None:
        """Keeps content in the place of what was kept before."""
        raise NotImplementedError

    @property
    def due(self) -> bool:
        return time.monotonic() - self.before >= self.seconds

    def write(self, state: State) -> None:
        """Keeps a state.

        Args:
            state: Tensors, numbers, texts and None, in lists and dicts.
        """
        buffer = io.BytesIO()
        content = {"keys": self.keys, "circumstances": self.circumstances, "state": state}
        torch.save(content, buffer)
        self.keep(buffer.getvalue())
        self.before = time.monotonic()

    def read(self) -> State | None:
        """What was written last, by a process under the same circumstances; else None."""
        content = decoded(self.load())
        if (content.get("keys"), content.get("circumstances")) != (self.keys, self.circumstances):
            return None
        state: State = content["state"]
        return state


class Checkpoint(States):
    """The states of a group in a file, which is replaced in one step."""

    def __init__(
        self, folder: Path, keys: Sequence[str], circumstances: str, seconds: float
    ) -> None:
        super().__init__(keys, circumstances, seconds)
        name = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:20]
        self.path = folder / f"{name}.pt"

    def load(self) -> bytes | None:
        return content_of(self.path)

    def keep(self, content: bytes) -> None:
        with replacing(self.path) as temporary:
            temporary.write_bytes(content)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class Sent(States):
    """The states of a group that is trained where the output folder may not be.

    Args:
        content: What the group is resumed from.
        send: Called with each state that is to be kept.
    """

    def __init__(
        self,
        keys: Sequence[str],
        circumstances: str,
        seconds: float,
        content: bytes | None,
        send: Callable[[bytes], None],
    ) -> None:
        super().__init__(keys, circumstances, seconds)
        self.content, self.send = content, send

    def load(self) -> bytes | None:
        return self.content

    def keep(self, content: bytes) -> None:
        self.send(content)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of an output folder.

    Args:
        circumstances, seconds: As for :class:`States`.
    """

    folder: Path
    circumstances: str
    seconds: float

    def of(self, keys: Sequence[str]) -> Checkpoint:
        return Checkpoint(self.folder, keys, self.circumstances, self.seconds)

    def begun(self, missing: Mapping[str, Run]) -> list[list[Run]]:
        """The groups of missing runs, given by key, that have a checkpoint to be resumed from.

        The checkpoint of a group of which a run is recorded is old, and removed.
        """
        groups: list[list[Run]] = []
        for path in sorted(self.folder.glob("*.pt")):
            content = decoded(content_of(path))
            keys = content.get("keys", [])
            if any((self.folder / f"{key}.json").exists() for key in keys):
                path.unlink(missing_ok=True)
            elif keys and content["circumstances"] == self.circumstances:
                found = [missing[key] for key in keys if key in missing]
                if len(found) == len(keys):
                    groups.append(found)
        return groups


def content_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def decoded(content: bytes | None) -> State:
    """What was kept, as a dict; empty where it is absent or damaged."""
    try:
        found = torch.load(io.BytesIO(content or b""), map_location="cpu", weights_only=True)
    except DAMAGES:
        return {}
    return found if isinstance(found, dict) else {}
