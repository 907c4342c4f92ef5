"""What a study names as ``module:name``: the user's own aggregators, networks and tasks.

It is imported where a study is run, never where one is read.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradagree_opt.ablation.section import StudyError


def find(reference: str) -> Any:
    """What a name in a module stands for; modules in the current folder are found too.

    Raises:
        ValueError: There is no such module or name, or the import raises anything.

    >>> find("statistics:median")([1, 5, 2])
    2
    """
    module, name = reference.split(":")
    look_here()
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # it is the user's, and may raise anything
        raise ValueError(told(error)) from None


def call(reference: str, /, **arguments: Any) -> Any:
    """What the function or class of that name gives.

    Raises:
        ValueError: As :func:`find`; or it cannot be called so, or raises anything.
    """
    make = find(reference)
    try:
        return make(**arguments)
    except Exception as error:  # as above
        raise ValueError(told(error)) from None


def told(error: Exception) -> str:
    """An error of any kind in one line, with its kind, unless that is a ValueError."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0]


def digests(references: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the text of each module that is named; what it imports is not looked at.

    Raises:
        StudyError: A module is not found.
    """
    modules = sorted(set(map(module_of, references)))
    return {name: hashlib.sha256(file_of(name).read_bytes()).hexdigest() for name in modules}


def module_of(reference: str) -> str:
    return reference.partition(":")[0]


def file_of(module: str) -> Path:
    look_here()
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # a package above it is missing, or raises anything
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise StudyError(
            f"expected a Python module {module!r} in {Path.cwd()} or where Python looks for "
            "modules, found none; run the study in the module's folder"
        )
    return Path(spec.origin)


def look_here() -> None:
    """Has Python look for modules in the current folder too, for those written by now."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
