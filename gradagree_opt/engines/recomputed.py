"""What of a graph is not autograd's own: what checkpointing makes anew, functions of others."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import CheckpointFunction


@contextmanager
def from_these(
    leaves: Sequence[Tensor], modules: Iterable[nn.Module], loss: Tensor, /
) -> Iterator[None]:
    """A backward pass that may compute modules anew, but only from the parameters of the loss.

    ``torch.func.functional_call`` has given a module its own parameters back by then.

    Args:
        leaves: the parameters that the loss was computed from.
        modules: those that it may have been computed by.
        loss: what is differentiated.

    Raises:
        RuntimeError: a module holds others, which require a gradient.
    """
    known, given = {id(module) for module in modules}, {_place(leaf) for leaf in leaves}

    def look(module: nn.Module, _: object) -> None:
        # Other threads may call it too, and they are in no backward pass.
        if id(module) not in known or torch._C._current_graph_task_id() == -1:
            return
        own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        others = {id(parameter) for parameter in own if _place(parameter) not in given}
        if others and not others <= _variables(loss):
            raise RuntimeError(
                f"checkpointing that computes {type(module).__name__} anew from the parameters "
                "which the module holds, and not from those that it was called with"
            )

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def refuse_reentrant(nodes: Iterable[Node], /) -> None:
    """Raises a ValueError where a graph was checkpointed in the way that returns no gradient.

    With ``use_reentrant=True`` a part of the graph adds to ``.grad`` by a backward pass of its own,
    and ``torch.autograd.grad`` passes it by where nothing before it is trained. Its nodes are known
    by a private name (torch 2.5 to 2.14).
    """
    for node in nodes:
        if getattr(type(node), "_forward_cls", None) is CheckpointFunction:
            raise of_reentrant()


def is_foreign(node: Node, /) -> bool:
    """Whether it is none of PyTorch's own: its backward pass is somebody else's code."""
    return issubclass(type(node), BackwardCFunction) or type(node).__name__ == "CppFunction"


@contextmanager
def cuts_refused(foreign: Iterable[Node], /) -> Iterator[None]:
    """A context around a backward pass that is to be differentiated in turn.

    Raises:
        RuntimeError: autograd does not record what one of these nodes does in it: a kernel of the
            user's own, without a second derivative.
    """
    handles = [node.register_hook(_refuse_cut) for node in foreign]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_cut(outgoing: tuple[Tensor | None, ...], incoming: tuple[Tensor | None, ...]) -> None:
    depends = any(grad is not None and grad.requires_grad for grad in incoming)
    if depends and any(grad is not None and _is_cut(grad) for grad in outgoing):
        raise RuntimeError("a backward pass that cannot be differentiated")


def _is_cut(grad: Tensor) -> bool:
    # The node of once_differentiable, an Error, is one that torch.func never comes to.
    return not grad.requires_grad or type(grad.grad_fn).__name__ == "Error"


def of_reentrant() -> ValueError:
    """The error of checkpointing that returns no gradient, in one sentence."""
    return ValueError(
        "expected checkpointing that returns gradients, found use_reentrant=True, which adds them "
        "to .grad itself; pass use_reentrant=False, as transformers does in "
        'gradient_checkpointing_enable({"use_reentrant": False})'
    )


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where its numbers lie."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _variables(loss: Tensor) -> set[int]:
    """What tells the leaves that a loss was computed from."""
    return {id(node.variable) for node in nodes_of(loss) if hasattr(node, "variable")}


def nodes_of(loss: Tensor, /) -> Iterator[Node]:
    """The nodes of its graph, each once."""
    pending: list[Node | None] = [loss.grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [following for following, _ in node.next_functions]
