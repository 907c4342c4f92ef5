"""Adapted parameters θ_i: which of them is which parameter θ, and how far it has moved."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradagree_opt.loops.graphs import check_outside_vmap, depends

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
"""A module, or its parameters by name or in order."""


def named(parameters: Parameters, /) -> dict[str, Tensor]:
    """Parameters by name, or by position where they have none.

    Raises:
        TypeError: they are neither a module nor tensors.
    """
    if isinstance(parameters, nn.Module):
        return dict(parameters.named_parameters())
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"expected a module or tensors, found {type(cast(object, parameters)).__name__}; "
            "give the module itself or its parameters()"
        )
    if not isinstance(parameters, Mapping):
        parameters = {str(position): tensor for position, tensor in enumerate(parameters)}
    for name, tensor in cast(Mapping[str, Any], parameters).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected a module or tensors, found {type(tensor).__name__} at {name!r}; "
                "give the module itself or its parameters()"
            )
    return dict(parameters)


def trained(parameters: Mapping[str, Tensor], /) -> dict[str, Tensor]:
    """Those of the parameters whose ``.grad`` is to be filled: they require a gradient.

    Raises:
        TypeError: one is complex.
        ValueError: there is none, one was computed from other tensors, one occurs twice, or they
            lie on several devices or on "meta".
    """
    found = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
    if not found:
        raise ValueError(
            f"expected parameters of which at least one requires a gradient, found "
            f"{len(parameters)} that do not; call requires_grad_() on those to train"
        )
    names: dict[int, str] = {}
    first_name, device = next((name, tensor.device) for name, tensor in found.items())
    for name, tensor in found.items():
        if tensor.is_complex():
            raise TypeError(
                f"expected real parameters to train, found {tensor.dtype} in {name!r}; hold it as "
                "torch.view_as_real(…), and take view_as_complex(…) in forward"
            )
        if not tensor.is_leaf:
            raise ValueError(
                f"expected the parameters to train, found {name!r} computed from other tensors; "
                "give the model itself, before it adapts, and no clone of it"
            )
        if tensor.device != device:
            raise ValueError(
                f"expected parameters on one device, found {device} in {first_name!r} and "
                f"{tensor.device} in {name!r}; give each device a TaskBatch of its own"
            )
        _check_holds_numbers(name, tensor)
        other = names.setdefault(id(tensor), name)
        if other != name:
            raise ValueError(
                f"expected every parameter once, found {other!r} again as {name!r}; leave it out "
                "there, and in the adapted parameters too"
            )
    return found


def match(parameters: Mapping[str, Tensor], adapted: Parameters, /) -> dict[str, Tensor]:
    """Adapted parameters under the names of the parameters that they were adapted from.

    Where all their names are known they go by name, and a parameter without one has not adapted:
    learn2learn's MetaSGD clones hold no inner rates. Otherwise they go in order, and names may
    differ by a prefix, as those of a wrapped module do.

    Args:
        parameters: by name or position, as :func:`named` gives them.
        adapted: a module, or tensors by name or in order.

    Raises:
        TypeError: ``adapted`` is neither a module nor tensors.
        ValueError: these are no adapted parameters of the same model, or they hold no numbers, or
            are those of a vmap.
    """
    after = named(adapted)
    has_names = isinstance(adapted, nn.Module | Mapping)
    listed = "0" in parameters  # names are positions, as those of an nn.ParameterList are
    known = after.keys() == parameters.keys() if listed else after.keys() <= parameters.keys()
    if not (has_names and after and known):
        if len(after) != len(parameters):
            raise ValueError(
                f"expected adapted parameters for the {len(parameters)} of the batch, found "
                f"{len(after)}; give TaskBatch the module itself and add its learner, or list the "
                "parameters of both in the same order"
            )
        if has_names and not listed and _inner_names(parameters) != _inner_names(after):
            raise ValueError(
                f"expected the learner of the same model, found parameters {[*after][:3]} where "
                f"the batch has {[*parameters][:3]}; add the learner adapted from that model"
            )
        after = dict(zip(parameters, after.values(), strict=True))
    for name, tensor in after.items():
        check_outside_vmap(tensor)
        if not parameters[name].is_meta:
            _check_holds_numbers(name, tensor)
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"expected adapted parameters of the same shapes, found {list(tensor.shape)} for "
                f"{name!r} of shape {list(parameters[name].shape)}; add the learner adapted from "
                "the same model, its parameters in the same order (of what a vmap has stacked, "
                "p[i] for task i)"
            )
    if all(_is_same(tensor, parameters[name]) for name, tensor in after.items()):
        raise ValueError(
            "expected adapted parameters, found the parameters of the batch themselves; add the "
            "learner that was adapted to the task, with TorchOpt before its original parameters "
            "are recovered"
        )
    return after


def displacement(
    parameters: Mapping[str, Tensor], adapted: Mapping[str, Tensor], /
) -> dict[str, Tensor]:
    """θ − θ_i as a constant, for every parameter; zero for those that have not adapted.

    >>> displacement({"w": torch.tensor(3.0), "lr": torch.tensor(0.1)}, {"w": torch.tensor(1.0)})
    {'w': tensor(2.), 'lr': tensor(0.)}
    """
    return {
        name: (before - adapted[name]).detach() if name in adapted else torch.zeros_like(before)
        for name, before in parameters.items()
    }


def advice_on_loss(after: Mapping[str, Tensor], parameters: Mapping[str, Tensor], /) -> str:
    """What to do about a loss that does not depend on the parameters.

    Args:
        after: the adapted parameters of its task; none where it is added without.
        parameters: those of the batch.
    """
    if not after:
        return "compute it from the parameters that were given, not from a copy of them"
    moved = [tensor for name, tensor in after.items() if tensor is not parameters[name]]
    # Parts of a leaf, as of what one vmap has adapted for all tasks, are no leaves themselves.
    parts = any(tensor._base is not None and tensor._base.is_leaf for tensor in moved)
    if parts or not any(tensor.requires_grad for tensor in moved):
        return (
            "for first-order MAML, compute it from adapted={name: p.detach().requires_grad_() …}, "
            "made of the adapted parameters of its task"
        )
    return (
        "adapt from those that the batch was given: by clone() in learn2learn, with "
        "copy_initial_weights=False in higher"
    )


def check_of_adapted(loss: Tensor, adapted: Sequence[Tensor], task: int, /) -> None:
    """Raises a ValueError where a task has adapted tensors and its loss depends on none."""
    # What one vmap has adapted for all tasks is taken apart by views of it.
    origins = [tensor._base for tensor in adapted if tensor._base is not None]
    if adapted and not depends(loss, [*adapted, *origins]):
        raise ValueError(
            f"expected a loss of the adapted parameters, found one for task {task} that depends on "
            "none of them; add every loss with its own learner, computed after its last inner step"
        )


def _check_holds_numbers(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(
            f"expected parameters that hold numbers, found {name!r} on the device meta; give the "
            "tensors that the module is called with, and not the empty module (of make_functional, "
            "or a copy for functional_call)"
        )


def _is_same(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether it is the parameter itself, or its ``data``, as ``state_dict`` gives it."""
    try:
        return tensor.is_set_to(parameter)
    except RuntimeError:  # under vmap, or on two devices
        return tensor is parameter


def _inner_names(names: Iterable[str]) -> list[list[str]]:
    """The names without the modules that all of them lie in."""
    paths = [name.split(".") for name in names]
    depth = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))))
    return [path[depth:] for path in paths]
