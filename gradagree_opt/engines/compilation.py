"""torch.compile as the engines and the meta-steps use it."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from gradagree_opt.options import check_choice

COMPILES_FROM = "2.10"
"""The compilers of PyTorch 2.5 to 2.8 do not trace _replace of named tuples; 2.9 was not tried."""
PROGRAMS = 2**12
"""Graphs that are kept of one function, for the many aggregators of a study; torch keeps 8."""

Function = TypeVar("Function", bound=Callable[..., Any])

LIBRARIES = (
    "G['__builtins_dict_",
    "G['__import_contextlib']",
    "G['__import_gradagree_opt_dot_",
    "G['__import_torch']",
    "G['__import_torch_dot_",
    "__import__('torch')",
)
"""How the names of guards on torch and on this library begin (torch 2.14)."""


def maybe_compiled(function: Function, compile: bool, /) -> Function:
    """The function, compiled as one graph of static shapes where asked for.

    Raises:
        ValueError: this PyTorch cannot compile it.
    """
    check_choice("compile", compile, (True, False))
    if not compile:
        return function
    if torch.__version__ < COMPILES_FROM:
        raise ValueError(
            f"expected PyTorch {COMPILES_FROM} or later for compile=True, found "
            f"{torch.__version__}; take compile=False, or a newer PyTorch"
        )
    # Convolutions with weights of each task are grouped. Channels last, which is inductor's choice
    # for all on a CPU and for none that is grouped on a GPU, takes 1.3 times as long (torch 2.14).
    options: dict[str, Any] = {"layout_optimization": False}
    # Small steps take 0.8 of the time without Python in between. Not tried on older torch, nor
    # where there is an accelerator.
    if torch.__version__ >= "2.14" and not torch.accelerator.is_available():
        options["cpp_wrapper"] = True
    if hasattr(torch.compiler, "skip_guard_on_globals_unsafe"):  # older torch takes no filter
        options["guard_filter_fn"] = _guards_on_others
    takes_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": PROGRAMS} if takes_limit else {}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options, **limit)
    return cast(Function, compiled)


def _guards_on_others(guards: Sequence[Any]) -> list[bool]:
    """Leaves out the guards on the libraries, which would take a tenth of every step.

    The user's own is guarded: the loss function, all that it reaches, parameters and tasks.
    """
    return [not guard.name.startswith(LIBRARIES) for guard in guards]
