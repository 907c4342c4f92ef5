"""Checks of options: each raises one sentence that says what is expected and what was found."""

import operator
import sys
from typing import TypeGuard


def check_choice(option: str, value: object, choices: tuple[object, ...], /, *others: str) -> None:
    """Raises a ValueError unless the value is one of the choices.

    ``others`` say in words what else the caller takes, and has looked for.
    """
    if not _is_one_of(value, choices):
        expected = ", ".join([*(repr(choice) for choice in choices), *others])
        raise ValueError(f"expected {option} to be one of {expected}; found {value!r}")


def _is_one_of(value: object, choices: tuple[object, ...]) -> bool:
    try:
        return value in choices
    except Exception:  # an array, which compares entry by entry
        return False


def check_callable(name: str, value: object, advice: str, /) -> None:
    """Raises a TypeError, which ends in the advice, unless it can be called."""
    if not callable(value):
        raise TypeError(
            f"expected {name} to be a function, found {type(value).__name__}; give {advice}"
        )


def check_positive(option: str, value: object, /) -> None:
    """Raises a ValueError unless the value is a positive finite number."""
    if not is_finite_number(value) or not value > 0:
        raise ValueError(
            f"expected a positive number for {option}, found {value!r}; give an int or a float "
            "above 0"
        )


def is_finite_number(value: object, /) -> TypeGuard[int | float]:
    """Whether it is an int or a float, not a bool, that a float holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def check_count(name: str, count: int, /, *, least: int = 0) -> int:
    """The number of inner steps or the like, or a ValueError in one sentence."""
    try:
        number = operator.index(count)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"expected {name} to be an integer of {least} or more, found {count!r}")
    return number
