"""The global random state, so that a second pass over a task draws what the first one drew."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradagree_opt.stacks import PyTree


class RandomState:
    """State of the global generators of the devices that the tensors of a pytree are on.

    >>> state = RandomState(torch.zeros(1))
    >>> first = torch.rand(1)
    >>> state.restore()
    >>> bool(torch.rand(1) == first)
    True
    """

    def __init__(self, tree: PyTree, /) -> None:
        types = {leaf.device.type for leaf in tree_leaves(tree)} | {"cpu"}
        self._states: list[tuple[Any, Tensor]] = [
            (generator, generator.get_rng_state()) for generator in map(_generator_of, types)
        ]

    def restore(self) -> None:
        """Sets the generators back to it."""
        for generator, state in self._states:
            generator.set_rng_state(state)


def _generator_of(device_type: str) -> Any:
    """The module that holds the random state of the current device of a type."""
    return torch if device_type == "cpu" else torch.get_device_module(device_type)
