"""What the parts of a study file share, and how a mistake in one says where it is."""

import re
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    model_validator,
)
from pydantic_core import PydanticCustomError

REFERENCE = r"^(?!.*\.py:)[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""``module:name``, by which a study names what is the user's own."""
Optimizer: TypeAlias = Literal["sgd", "momentum", "adam"]


class StudyError(ValueError):
    """A mistake in a study file, an option or an output folder, told in one sentence."""


def arguments(message: str, /) -> str:
    """A message of the command as the Python call says it: with arguments for options.

    >>> arguments("--out a is a file; `gradagree ablate sine --out NEW` goes elsewhere")
    'out a is a file; `gradagree ablate sine --out NEW` goes elsewhere'
    """
    return re.sub(r"(`.*?`)|(?<!\S)--(?=\w)", r"\1", message)


class LocatedError(ValueError):
    """A value that contradicts another one, and the keys that lead to it."""

    def __init__(self, message: str, *location: int | str) -> None:
        super().__init__(message)
        self.location = location


class Section(BaseModel):
    """A part of the study file: no unknown keys, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def known_keys(cls, given: Any) -> Any:
        """What is given, unless a key of it is unknown: then an error that says which there are."""
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                error = LocatedError(
                    f"unknown key {key!r}; {meant(str(key), cls.model_fields)}", key
                )
                raise PydanticCustomError("unknown_key", "unknown key", {"error": error})
        return given


def meant(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have been, or all that there are.

    >>> meant("shcedule", ["rates", "schedule"]), meant("x", ["rates", "schedule"])
    ("did you mean 'schedule'?", 'there are rates, schedule')
    """
    found = get_close_matches(name, known, n=1)
    return f"did you mean {found[0]!r}?" if found else f"there are {', '.join(known)}"


def unique(entries: list[Any]) -> list[Any]:
    """The entries, unless two of them are equal or have one name."""
    names = Counter(getattr(entry, "name", entry) for entry in entries)
    for name, count in names.items():
        if count > 1:
            raise ValueError(f"{name!r} is given more than once")
    return entries


def reference(name: str) -> str:
    """The name, if it has the form of one in a module."""
    if not re.match(REFERENCE, name):
        raise ValueError(f"expected module:name, as my_file:MyClass of my_file.py, found {name!r}")
    return name


Reference: TypeAlias = Annotated[str, AfterValidator(reference)]
Plain: TypeAlias = bool | int | float | str
Options: TypeAlias = dict[str, Plain | list[Plain] | None]
Rate: TypeAlias = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Rates: TypeAlias = Annotated[list[Rate], Field(min_length=1), AfterValidator(unique)]
MOST_SEEDS = 10_000
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Seeds: TypeAlias = Annotated[
    list[Seed], Field(min_length=1, max_length=MOST_SEEDS), AfterValidator(unique)
]
