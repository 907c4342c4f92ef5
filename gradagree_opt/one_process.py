"""One process: what several ranks train together is refused until aggregation is exact over them.

Data parallelism averages what passes the accumulation of ``.grad``. A gradient that is taken for a
task and weighted before does not pass there, so the replicas would drift apart without a word.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_GATHER = "give one process all the tasks of a step, or take ga.distributed(aggregator)"


def check_one_process(
    tensors: Iterable[Any],
    /,
    module: object = None,
    *,
    over_ranks: bool = False,
    wrapped: bool = False,
) -> None:
    """Raises a ValueError where a module, a tensor or the process group shows several ranks.

    Args:
        tensors: the parameters.
        module: that they are of, if it is known.
        over_ranks: the aggregator is one of several ranks, so that a process group may be there.
        wrapped: and DistributedDataParallel, where a forward or backward pass sends nothing, and
            parameters of FSDP2.

    >>> check_one_process([torch.zeros(2)], nn.Linear(1, 1))
    """
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if wrapped and over_ranks and isinstance(part, nn.parallel.DistributedDataParallel):
            _check_sends_nothing(part)
        elif isinstance(part, _wrappers(sharded=not (wrapped and over_ranks))):
            raise ValueError(
                f"expected a module that one process trains, found {type(part).__name__}, whose "
                "averages over the ranks the gradients of single tasks would not pass; give the "
                f"module that it wraps, and {_GATHER}"
            )
    check_whole(tensors, sharded=wrapped and over_ranks)
    distributed = torch.distributed
    if over_ranks:
        return
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            raise ValueError(
                f"expected one process, found a process group of {ranks} ranks, whose replicas "
                f"would drift apart; {_GATHER}, or aggregate gradients that you have gathered by "
                "aggregator.aggregate(…)"
            )


def check_whole(tensors: Iterable[Any], /, *, sharded: bool = False) -> None:
    """Raises a ValueError where a parameter lies in parts on several ranks.

    ``sharded``: DTensors may.

    >>> check_whole([torch.zeros(2)])
    """
    dtensor = getattr(_imported("torch.distributed.tensor"), "DTensor", ())
    for tensor in tensors:
        # DTensors are FSDP2's and tensor parallelism's; DeepSpeed's of ZeRO 3 have an id.
        dtensors = isinstance(tensor, dtensor) and not sharded
        if dtensors or (isinstance(tensor, Tensor) and hasattr(tensor, "ds_id")):
            raise ValueError(
                f"expected parameters that one process holds, found {type(tensor).__name__}, a "
                "part of which lies on every rank and has a gradient of zero in a functional call; "
                f"leave out fully_shard and its like, and {_GATHER}"
            )


def inside(module: Any, /) -> Any:
    """The module that DistributedDataParallel wraps, else what was given.

    >>> inside([1])
    [1]
    """
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def reshard(module: object, /) -> None:
    """Puts the parameters of FSDP2 back into their parts: the root shows whole ones after a call.

    >>> reshard(nn.Linear(1, 1))
    """
    for part in _fsdp_modules(module):
        part.reshard()


def check_fills_grad(parameters: Mapping[str, Tensor], /) -> None:
    """Raises a ValueError where FSDP2 gathers gradients, so that backward() fills no ``.grad``.

    >>> check_fills_grad({"w": torch.zeros(2)})
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in _fsdp_groups():
        own = [names[at] for each in group.fsdp_params if (at := id(each.sharded_param)) in names]
        switches = (getattr(group, f"{name}_grads", True) for name in ("reduce", "all_reduce"))
        if own and not (all(switches) and all(map(_is_empty, [group, *group.fsdp_params]))):
            raise ValueError(
                "expected FSDP modules that fill .grad in a backward pass, found one that gathers "
                f"the gradient of {own[0]!r}; call set_requires_gradient_sync(True), backward() "
                "and zero_grad() first"
            )


def check_not_unsharded(parameters: Mapping[str, Tensor], /) -> None:
    """Raises a ValueError for what FSDP2 shows between passes, whose ``.grad`` no optimizer sees.

    >>> check_not_unsharded({"w": torch.zeros(2)})
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in _fsdp_groups():
        for each in group.fsdp_params:
            if name := names.get(id(getattr(each, "_unsharded_param", None))):
                raise ValueError(
                    f"expected parameters as the optimizer has them, found {name!r} as FSDP puts "
                    "it together for a forward pass; give the module itself, and build optimizers "
                    "and lists of parameters before the first forward pass"
                )


def _fsdp_groups() -> Iterator[Any]:
    """The groups of parameters that FSDP2 sends together, of all modules of this process.

    PyTorch has no public way to ask. These names are its own since 2.5; where there is none of
    them, a batch is refused only if no parameter has a gradient.
    """
    module = _imported("torch.distributed._composable_state")
    for held in [*getattr(module, "_module_state_mapping", {}).values()]:
        state = held() if callable(held) else held
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in groups or [getattr(state, "_fsdp_param_group", None)]:
            if hasattr(group, "fsdp_params"):
                yield group


def _is_empty(holder: object) -> bool:
    """Whether FSDP2 holds no gradient there that it has gathered and not yet sent."""
    unsharded = getattr(getattr(holder, "_unsharded_param", None), "grad", None)
    names = ("unsharded_accumulated_grad", "_partial_reduce_output")
    return unsharded is None and all(getattr(holder, name, None) is None for name in names)


def _fsdp_modules(module: object) -> list[Any]:
    modules = module.modules() if isinstance(module, nn.Module) else ()
    return [each for each in modules if isinstance(each, _fsdp_classes("FSDPModule"))]


def _check_sends_nothing(wrapper: nn.parallel.DistributedDataParallel) -> None:
    """Raises a ValueError where a pass of one task would wait for the other ranks."""
    sends = getattr(wrapper, "forward_sync_buffers", wrapper.broadcast_buffers)  # by its newer name
    if sends and any(True for _ in wrapper.module.buffers()):
        raise ValueError(
            "expected DistributedDataParallel whose forward pass sends nothing, found one of a "
            "module with buffers: ranks with other numbers of tasks would wait for them in vain; "
            "give it broadcast_buffers=False, or call the module that it wraps"
        )
    check_no_static_graph(wrapper)


def check_no_static_graph(wrapper: nn.parallel.DistributedDataParallel, /) -> None:
    """Raises a ValueError where the first backward pass would average, whatever it is told."""
    if wrapper.static_graph:
        raise ValueError(
            "expected DistributedDataParallel whose backward pass sends nothing, found "
            "static_graph=True, which averages in the first one of any task; leave it out"
        )


def _wrappers(*, sharded: bool) -> tuple[type, ...]:
    """The modules that average over ranks; what has not been imported wraps nothing.

    ``sharded``: those of FSDP2 among them.
    """
    names = ("FullyShardedDataParallel", "FSDPModule")[: 1 + sharded]
    return (nn.parallel.DistributedDataParallel, *_fsdp_classes(*names))


def _fsdp_classes(*names: str) -> tuple[type, ...]:
    """Those that are there, of what has been imported; FSDP2 has its public name from 2.6 on."""
    rooms = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")
    modules = [_imported(room) for room in rooms]
    return tuple(getattr(each, name) for each in modules for name in names if hasattr(each, name))


def _imported(name: str) -> ModuleType | None:
    return sys.modules.get(name)
