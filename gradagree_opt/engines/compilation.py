"""torch.compile as the engines and the meta-steps use it."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def maybe_compiled(function: Function, compile: bool, /) -> Function:
    """The function, compiled as one graph of static shapes where asked for."""
    if not compile:
        return function
    # An ablation hands one step many aggregators, each a compilation; older torch stops at 8.
    takes_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": 64} if takes_limit else {}
    return cast(Function, torch.compile(function, fullgraph=True, dynamic=False, **limit))
