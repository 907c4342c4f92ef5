"""Calls a module with other tensors than its own, also one that holds a submodule twice."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], /, *args: Any) -> Any:
    """``module(*args)`` with other parameters and buffers.

    ``torch.func.functional_call``, but for modules that hold one submodule under two names (as
    learn2learn's networks do): there it leaves the given tensors in the module.

    Args:
        module: any module.
        tensors: by name, as ``named_parameters`` and ``named_buffers`` give them; a tied parameter
            has one name and takes its tensor wherever it occurs.
        args: of the call.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> call_with(net, {"weight": torch.tensor([[3.0]])}, torch.ones(1, 1))
    tensor([[3.]])
    """
    names = {id(t): n for n, t in chain(module.named_parameters(), module.named_buffers())}
    # Every place that holds a tensor once: named_modules gives a shared submodule one name.
    places = {
        f"{prefix}.{key}" if prefix else key: names[id(tensor)]
        for prefix, owner in module.named_modules()
        for key, tensor in chain(
            owner.named_parameters(recurse=False, remove_duplicate=False),
            owner.named_buffers(recurse=False, remove_duplicate=False),
        )
    }
    given = {place: tensors[name] for place, name in places.items() if name in tensors}
    return torch.func.functional_call(module, given, args, tie_weights=False)
