"""The global random state, so that a second pass over a task draws what the first one drew."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from gradagree_opt.core.stacks import PyTree


class RandomState:
    """State of the global generators of the CPU and of the devices that some tensors are on.

    Args:
        trees: pytrees of tensors.

    >>> state = RandomState(torch.zeros(1))
    >>> first = torch.rand(1)
    >>> state.restore()
    >>> bool(torch.rand(1) == first)
    True
    """

    def __init__(self, *trees: PyTree) -> None:
        devices = {leaf.device for leaf in tree_leaves(trees) if leaf.device.type != "cpu"}
        self._cpu = torch.get_rng_state()
        self._others = [(device, _module_of(device).get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        """Sets the generators back to it."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            _module_of(device).set_rng_state(state, device)


def _module_of(device: torch.device) -> Any:
    """torch.cuda, torch.xpu, …: what holds the generators of the devices of a type."""
    return torch.get_device_module(device)
