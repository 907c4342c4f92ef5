"""What the parts of a study file share, and how a mistake in one says where it is."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat

REFERENCE = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""``module:name``, by which a study names what is the user's own."""
Optimizer: TypeAlias = Literal["sgd", "momentum", "adam"]


class StudyError(ValueError):
    """A mistake in a study file, an option or an output folder, told in one sentence."""


class LocatedError(ValueError):
    """A value that contradicts another one, and the keys that lead to it."""

    def __init__(self, message: str, *location: int | str) -> None:
        super().__init__(message)
        self.location = location


class Section(BaseModel):
    """A part of the study file: no unknown keys, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def unique(entries: list[Any]) -> list[Any]:
    """The entries, unless two of them are equal or have one name."""
    names = [getattr(entry, "name", entry) for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is given more than once")
    return entries


Reference: TypeAlias = Annotated[str, Field(pattern=REFERENCE)]
Plain: TypeAlias = bool | int | float | str
Options: TypeAlias = dict[str, Plain | list[Plain] | None]
Rate: TypeAlias = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Rates: TypeAlias = Annotated[list[Rate], Field(min_length=1), AfterValidator(unique)]
Seeds: TypeAlias = Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(unique)]
