"""Autograd graphs: what a loss was computed from, and its gradients or one sentence."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from gradagree_opt.core.transforms import is_batched
from gradagree_opt.engines.recomputed import is_foreign, of_reentrant


def dependencies(loss: Tensor, tensors: Sequence[Tensor], /) -> Iterator[int]:
    """Positions of those tensors that a loss was computed from, each as soon as it is found.

    The walk through the graph does not go on behind a tensor that it has found.

    Args:
        loss: any tensor.
        tensors: those in question; a tensor that requires no gradient is never found.

    >>> import torch
    >>> a, b = torch.ones(2, requires_grad=True)
    >>> list(dependencies(a.exp(), [a, b]))
    [0]
    """
    if not loss.requires_grad:
        return
    # A leaf is known by itself: to ask for its edge would take as long as the walk.
    wanted = {
        id(tensor) if tensor.is_leaf else _edge(tensor): at
        for at, tensor in enumerate(tensors)
        if tensor.requires_grad
    }
    pending: list[tuple[Node | None, int]] = [_edge(loss)]
    visited = set()
    while pending:
        edge = pending.pop()
        node = edge[0]
        leaf = getattr(node, "variable", None) if _is_leaf(node) else None
        place = edge if leaf is None else id(leaf)
        if place in wanted:
            yield wanted.pop(place)
        elif node is not None and node not in visited:
            visited.add(node)
            pending += node.next_functions


def depends(loss: Tensor, tensors: Iterable[Tensor], /) -> bool:
    """Whether a loss was computed from any of the tensors."""
    return next(dependencies(loss, list(tensors)), None) is not None


def check_loss(
    loss: object, task: int, /, *, advice: str = "compute it from the parameters"
) -> None:
    """Raises a ValueError unless the loss of a task is a real scalar tensor with a graph.

    Args:
        loss: of one task.
        task: which one it is.
        advice: what to do about a loss without a graph.
    """
    without = ", and leave out a task that has no examples"
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"expected a scalar loss, found {type(loss).__name__} for task {task}; give the tensor "
            f"that backward() would be called on{without if isinstance(loss, int | float) else ''}"
        )
    check_outside_vmap(loss)
    if loss.ndim != 0:
        raise ValueError(
            f"expected a scalar loss, found shape {list(loss.shape)} for task {task}; reduce it, "
            "as in loss.mean()"
        )
    if loss.is_complex():
        raise ValueError(
            f"expected a real loss, found {loss.dtype} for task {task}; take its real part, or its "
            "abs()"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"expected a loss with a graph, found one that requires no gradient for task {task}; "
            f"{advice}, outside torch.no_grad(){without}"
        )


def check_outside_vmap(tensor: Tensor, /) -> None:
    """Raises a ValueError where a tensor of a task is one of a vmap, and dies when that ends."""
    if is_batched(tensor):
        raise ValueError(
            "expected the losses and adapted parameters of each task, found those of all tasks in "
            "the middle of a vmap; return them from the mapped function, and take task i from what "
            "vmap returns"
        )


def check_depends(
    loss: Tensor, tensors: Iterable[Tensor], task: int | None, /, *, advice: str
) -> None:
    """Raises a ValueError, which ends in the advice, unless the loss depends on the tensors.

    Args:
        loss: of one task.
        tensors: of which it has to depend on one.
        task: which one it is; None where all are computed at once.
        advice: what to do instead.
    """
    if not depends(loss, tensors):
        which = "one" if task is None else f"one for task {task}"
        raise ValueError(
            f"expected a loss that depends on the parameters, found {which} that depends on none "
            f"of them; {advice}"
        )


class Survey(NamedTuple):
    """What a walk through the graphs of several losses finds.

    Attributes:
        shared: whether two of them have more in common than leaves.
        foreign: nodes that are not PyTorch's own, whose backward pass is somebody else's code.
    """

    shared: bool
    foreign: list[Node]


def survey(losses: Sequence[Tensor], /) -> Survey:
    """Walks through the graphs of the losses, each node once.

    >>> import torch
    >>> w = torch.ones(3, requires_grad=True)
    >>> survey((2 * w).unbind()).shared, survey([w.sum(), w.max()]).shared
    (True, False)
    """
    shared, foreign = False, []
    visited: set[Node] = set()
    for loss in losses:
        own: set[Node] = set()
        pending: list[Node | None] = [_edge(loss)[0]]
        while pending:
            node = pending.pop()
            if node is None or node in own:
                continue
            if node in visited:
                shared = shared or bool(node.next_functions)
                continue
            own.add(node)
            if is_foreign(node):
                foreign.append(node)
            pending += [following for following, _ in node.next_functions]
        visited |= own
    return Survey(shared, foreign)


@contextmanager
def stale_graphs() -> Iterator[None]:
    """A context around a backward pass: turns its error about a stale graph into one sentence.

    Raises:
        ValueError: the graph of the loss is stale: a backward pass has freed it, or an optimizer
            step has changed the tensors it holds.
    """
    try:
        yield
    except RuntimeError as error:
        if "second time" in str(error):
            raise ValueError(
                "expected a loss whose graph is alive, found one that a backward pass has freed; "
                "add every loss once, to one TaskBatch where several optimizers step, without "
                "backward() of its own, and take memory='graph' where the losses of several tasks "
                "share a part of their graphs"
            ) from error
        if "use_reentrant" in str(error):
            raise of_reentrant() from error
        if "donated buffers" in str(error):
            raise ValueError(
                "expected losses whose compiled graph can be passed through more than once, found "
                "one of which torch.compile has given buffers away; set "
                "torch._functorch.config.donated_buffer = False before the model is compiled, and "
                "clear its cache, or give every task a forward pass of its own"
            ) from error
        if "modified by an inplace operation" in str(error):
            raise ValueError(
                "expected a loss of the parameters as they are, found one whose graph holds "
                "tensors changed since; compute and add the losses after the optimizer's last step"
            ) from error
        raise


def _is_leaf(node: Node | None) -> bool:
    return type(node).__name__ == "AccumulateGrad"


def _edge(tensor: Tensor) -> tuple[Node | None, int]:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr
