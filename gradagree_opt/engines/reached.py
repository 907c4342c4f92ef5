"""What a loss function reaches: the modules, the containers and the generators behind it.

Its closure and defaults, the globals that it names, the object that it is a method of, and so on
from there. A loss function that finds its model in another way (by import within it, by a name made
of strings) hides it.
"""

import random
import sys
from collections import OrderedDict, UserList, deque
from collections.abc import Iterable, Iterator, MutableMapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOST = 1000
"""A container of more entries is data; and the walk ends after ten times as many objects."""

_LIBRARIES = ("torch", "numpy", "functorch", "builtins", "typing", "collections", "functools")
_CHECKERS = ("jaxtyping", "beartype")
"""What wraps a function in checks of its types, with much behind it that is not the function's."""
_OF_A_MODULE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Among them many dicts of hooks, most of which are empty."""


class Names(NamedTuple):
    """The entries of a namespace that a function names."""

    namespace: dict[str, Any]
    names: tuple[str, ...]


class Reached(NamedTuple):
    """Modules, generators of random numbers, and the containers that modules hold."""

    modules: list[nn.Module]
    generators: list[Any]
    holders: list[MutableMapping[Any, Any] | list[Any] | CellType | Names]


def reach(*sources: object) -> Reached:
    """What some functions or objects reach, each thing once; a :class:`Reached` itself is returned.

    >>> model = nn.Linear(1, 1)
    >>> reach(lambda x, model=model: model(x).sum()).modules
    [Linear(in_features=1, out_features=1, bias=True)]
    >>> model.pool = nn.functional.max_pool2d  # a closure, but a library's own affair
    >>> any(isinstance(holder, CellType) for holder in reach(model).holders)
    False
    """
    if len(sources) == 1 and isinstance(sources[0], Reached):
        return sources[0]
    found = Reached([], [], [])
    outside = found._replace(holders=[])  # not put back: a loss function may keep what it likes
    pending = deque((source, outside) for source in sources)
    seen: dict[int, object] = {}
    while pending and len(seen) < 10 * MOST:
        thing, notes = pending.popleft()
        if thing is None or id(thing) in seen or _is_leaf(thing):
            continue
        seen[id(thing)] = thing  # kept, so that no other gets its id
        notes = found if isinstance(thing, nn.Module) else notes
        pending.extend((each, notes) for each in _visit(thing, notes))
    return found


_BASES = (OrderedDict, dict, list, deque)
_LEAVES = (str, bytes, int, float, complex, Tensor, type, CodeType, torch.dtype, torch.device)


def _is_leaf(thing: object) -> bool:
    """Whether the walk ends there, as at a weak proxy of an object that is gone."""
    try:
        return isinstance(thing, _LEAVES)
    except ReferenceError:
        return True


def _visit(thing: object, found: Reached) -> Iterable[object]:
    """Notes a thing, and gives those behind it."""
    if isinstance(thing, FunctionType):
        return _behind_function(thing, found)
    if isinstance(thing, MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, partial):
        return (thing.func, thing.args, thing.keywords)
    if isinstance(thing, nn.Module):
        return _behind_module(thing, found)
    if _is_generator(thing):
        found.generators.append(thing)
        return ()
    if isinstance(thing, MutableMapping | list | deque):
        if base_of(thing).__len__(thing) > MOST:
            return ()
        found.holders.append(thing)  # type: ignore[arg-type] # a deque is as a list here
        held = entries(thing)
        return list(held.values()) if isinstance(held, dict) else held
    if isinstance(thing, tuple | set | frozenset):
        return thing if len(thing) <= MOST else ()
    return _behind_object(thing, found)


def _behind_object(thing: object, found: Reached) -> Iterable[object]:
    if isinstance(thing, UserList):
        return (thing.data,)
    state = getattr(thing, "__dict__", None)
    if isinstance(thing, ModuleType) or _is_of_a_library(thing) or not isinstance(state, dict):
        return ()
    found.holders.append(state)
    return (*state.values(), getattr(type(thing), "__call__", None))  # noqa: B004 - it is walked, not asked for


def base_of(holder: Any, /) -> Any:
    """The class whose methods read and write a container without code of its own class.

    A subclass may load files in ``get`` or ``[]``, or take other keys there.
    """
    kind = type(holder)
    if kind in _BASES:
        return kind
    return next((base for base in _BASES if isinstance(holder, base)), kind)


def entries(holder: Any, /) -> dict[Any, Any] | list[Any]:
    """A copy of what a container holds.

    >>> entries(deque([1, 2])), entries({"a": 1})
    ([1, 2], {'a': 1})
    """
    base = base_of(holder)
    if base is dict:
        return dict.copy(holder)
    if issubclass(base, MutableMapping):
        return dict(base.items(holder))
    return list(base.__iter__(holder))


def _behind_function(function: FunctionType, found: Reached) -> Iterator[object]:
    if _is_library(function.__module__):
        return
    if (function.__globals__.get("__name__") or "").partition(".")[0] in _CHECKERS:
        yield getattr(function, "__wrapped__", None)
        return
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        found.holders.append(cell)
        try:
            yield cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    if _is_library(function.__module__, "gradagree_opt"):
        return
    names = tuple(name for name in _names(function.__code__) if name in function.__globals__)
    found.holders.append(Names(function.__globals__, names))
    for name in names:
        value = function.__globals__[name]
        yield value
        if isinstance(value, ModuleType) and not _is_library(value.__name__):
            yield from (vars(value).get(other) for other in _names(function.__code__))


def _behind_module(module: nn.Module, found: Reached) -> Iterator[object]:
    found.modules.append(module)
    found.holders.append(vars(module))
    yield from module._modules.values()
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE or (value and name not in _OF_A_MODULE):
            yield value
    if not _is_of_a_library(module):  # TorchScript's class has no forward to be read
        yield type(module).forward


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_generator(thing: object) -> bool:
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    return isinstance(thing, kinds)


def _is_of_a_library(thing: object) -> bool:
    return _is_library(type(thing).__module__)


def _is_library(name: str | None, *others: str) -> bool:
    return (name or "").partition(".")[0] in (*_LIBRARIES, *others)
