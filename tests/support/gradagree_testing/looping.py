"""Many cheap cases in one test, in place of an item of pytest for each of them."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any

Test = Callable[..., None]


def every(**axes: Iterable[Any] | Mapping[str, Any]) -> Callable[[Test], Test]:
    """Runs a test on all combinations of the axes, and names the one that fails.

    It stands where ``pytest.mark.parametrize`` would, which takes milliseconds for each case, and
    for cases that leave nothing behind: the fixtures are made once for all of them. An axis is its
    values, or a mapping of names to values.
    """
    named = [
        list(values.items())
        if isinstance(values, Mapping)
        else [(getattr(value, "__name__", str(value)), value) for value in values]
        for values in axes.values()
    ]
    cases = list(product(*named))
    assert cases, f"expected values on every axis, found none on one of {list(axes)}"

    def decorate(test: Test) -> Test:
        signature = inspect.signature(test)
        assert axes.keys() <= signature.parameters.keys()

        @functools.wraps(test)
        def looped(*args: Any, **fixtures: Any) -> None:
            for case in cases:
                names, values = zip(*case, strict=True)
                try:
                    test(*args, **fixtures, **dict(zip(axes, values, strict=True)))
                except Exception as error:
                    where = ", ".join(map("=".join, zip(axes, names, strict=True)))
                    raise AssertionError(f"with {where}: {error}") from error

        others = [p for name, p in signature.parameters.items() if name not in axes]
        looped.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return looped

    return decorate
