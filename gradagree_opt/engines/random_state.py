"""Random numbers: a second pass over a task draws what the first one drew, and tasks their own."""

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves

from gradagree_opt.core.stacks import PyTree
from gradagree_opt.engines.errors import SharedDrawsError
from gradagree_opt.engines.reached import reach


class RandomState:
    """State of what a loss function draws from: PyTorch, Python, NumPy and generators of its own.

    Args:
        trees: pytrees of tensors, for the devices that they are on.
        source: the loss function, for the generators that it reaches: of PyTorch, NumPy or Python.

    >>> state = RandomState(torch.zeros(1))
    >>> first = torch.rand(1)
    >>> state.restore()
    >>> bool(torch.rand(1) == first)
    True
    """

    def __init__(self, *trees: PyTree, source: object = None) -> None:
        devices = {leaf.device for leaf in tree_leaves(trees) if leaf.device.type != "cpu"}
        self._cpu = torch.get_rng_state()
        self._others = [
            (device, torch.get_device_module(device).get_rng_state(device)) for device in devices
        ]
        self._generators: list[tuple[Any, Any]] = []
        if not torch.compiler.is_compiling():
            own = [each for each in reach(source).generators if isinstance(each, torch.Generator)]
            self._generators = [(each, each.get_state()) for each in own] + _outside_torch(source)

    def restore(self) -> None:
        """Sets the generators back to it."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)
        for generator, state in self._generators:
            _set_state(generator, state)


def check_same_losses(first: torch.Tensor, again: torch.Tensor, /) -> None:
    """Raises a ValueError where a pass over the tasks has other losses than the first.

    Args:
        first: losses ``[n]``.
        again: those of another pass, which rounding alone may set apart.
    """
    if torch.compiler.is_compiling():
        return
    tolerance = 4 * torch.finfo(first.dtype).eps ** 0.5
    same = torch.isclose(first, again, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not bool(same.all()):
        task = int((~same).nonzero()[0])
        raise ValueError(
            f"expected the same loss of a task at every pass over it, found {first[task]:.6g} and "
            f"{again[task]:.6g} of task {task}, as of random numbers from a generator that is not "
            "to be found; draw from torch's, or take engine='stacked' with chunk_size=1, which "
            "passes once"
        )


def draws_of_each_task(
    randomness: Literal["error", "different", "same"], source: object, /
) -> AbstractContextManager[None]:
    """Raises where tasks that are to draw for themselves share what Python or NumPy has drawn.

    Args:
        randomness: as in torch.func.vmap, which looks after torch's own.
        source: the loss function.

    Raises:
        SharedDrawsError: the numbers are drawn once for all; the generators are as before.
    """
    if randomness == "same" or torch.compiler.is_compiling():
        return nullcontext()
    return _none_outside_torch(randomness, source)


@contextmanager
def _none_outside_torch(randomness: str, source: object) -> Iterator[None]:
    before = _outside_torch(source)
    yield
    changed = [(each, state) for each, state in before if not _same(state, _state_of(each))]
    for generator, state in changed:
        _set_state(generator, state)
    if changed:
        raise SharedDrawsError(
            "random numbers of Python or NumPy, which vmap draws once for all tasks, under "
            f"randomness={randomness!r}"
        )


def _outside_torch(source: object) -> list[tuple[Any, Any]]:
    """Generators of Python and, where it is imported, of NumPy, with their states."""
    own = [each for each in reach(source).generators if not isinstance(each, torch.Generator)]
    numpy = sys.modules.get("numpy")
    modules = [random] if numpy is None else [random, numpy.random]
    return [(each, _state_of(each)) for each in (*modules, *own)]


def _same(a: Any, b: Any) -> bool:
    """Whether two states are the same; NumPy's hold arrays."""
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and len(a) == 5:
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


def _state_of(generator: Any) -> Any:
    """Of a generator, or of a module that has a global one."""
    for name in ("getstate", "get_state"):
        if hasattr(generator, name):
            return getattr(generator, name)()
    return generator.bit_generator.state  # numpy.random.Generator


def _set_state(generator: Any, state: Any) -> None:
    for name in ("setstate", "set_state"):
        if hasattr(generator, name):
            getattr(generator, name)(state)
            return
    generator.bit_generator.state = state
