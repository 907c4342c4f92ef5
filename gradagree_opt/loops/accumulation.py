"""Adds an update to ``.grad``, and runs the hooks that wait for that."""

from collections.abc import Mapping

import torch
from torch import Tensor


def add_to_grad(
    parameters: Mapping[str, Tensor], update: Mapping[str, Tensor], /, *, over_ranks: bool = False
) -> None:
    """Adds an update to ``.grad`` as ``backward`` would, and runs the hooks after accumulation.

    ``over_ranks``: avoids the hooks of DistributedDataParallel, which would average what is the
    same on all ranks.
    """
    accumulated = {}
    for name, parameter in parameters.items():
        grad = parameter.grad
        plain = grad is None or (grad.layout == torch.strided and not grad.requires_grad)
        # Its own hooks have seen the gradients of the tasks, and are not to see their sum.
        if plain and not parameter._backward_hooks and not over_ranks:
            accumulated[name] = parameter
        else:
            if grad is None:
                parameter.grad = update[name].clone()
            elif plain:
                grad.add_(update[name])
            else:
                parameter.grad = update[name] + grad
            run_accumulation_hooks(parameter)
    if accumulated:
        updates = [update[name] for name in accumulated]
        torch.autograd.backward([*accumulated.values()], updates)


def check_no_accumulation_hooks(parameter: Tensor, /, *, advice: str) -> None:
    """Raises a ValueError where a hook after accumulation would see the tasks one by one."""
    if parameter._post_accumulate_grad_hooks:
        raise ValueError(
            "expected no hook of register_post_accumulate_grad_hook, found one, which would see "
            f"the gradient of every task by itself; {advice}"
        )


def run_accumulation_hooks(parameter: Tensor, /) -> None:
    """Runs the hooks of ``register_post_accumulate_grad_hook``, as ``backward`` would."""
    for hook in tuple((parameter._post_accumulate_grad_hooks or {}).values()):
        hook(parameter)
