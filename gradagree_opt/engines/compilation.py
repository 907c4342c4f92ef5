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
    # Convolutions with weights of each task are grouped. Channels last, which is inductor's choice
    # for all on a CPU and for none that is grouped on a GPU, takes 1.3 times as long (torch 2.14).
    options: dict[str, Any] = {"layout_optimization": False}
    # An ablation hands one step many aggregators, each a compilation; older torch stops at 8.
    takes_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": 64} if takes_limit else {}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options, **limit)
    return cast(Function, compiled)
