"""What to do about a model that cannot run over many tasks at once: the first cure that works."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from gradagree_opt.core.lost import RankLostError
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.engines.errors import (
    SharedDrawsError,
    explained,
    is_out_of_memory,
    without_memory,
)
from gradagree_opt.engines.kept import Model
from gradagree_opt.engines.losses import TaskLoss, TaskMap
from gradagree_opt.engines.random_state import RandomState

MATH = (
    "the math kernel of attention, with torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around the "
    "step"
)
FEW = 2
"""Tasks that a cure is tried on."""


class Cure(NamedTuple):
    """What to do instead, and a trial of it, which raises where it does not help."""

    advice: str
    trial: Callable[[], object]


def of_the_map(task_map: TaskMap, run: Callable[[TaskMap], object], /) -> Iterator[Cure]:
    """Other ways to apply a function to every task.

    >>> [cure.advice[:12] for cure in of_the_map(TaskMap(), print)]
    ["randomness='", 'chunk_size=1']
    """
    if task_map.chunk_size == 1:
        return
    if task_map.randomness == "error":
        yield Cure(
            "randomness='different', or 'same' for one draw for all tasks",
            partial(run, replace(task_map, randomness="different")),
        )
    yield Cure(
        "chunk_size=1, which does without vmap", partial(run, replace(task_map, chunk_size=1))
    )


def of_the_kernel(run: Callable[[], object], /) -> Cure:
    """Attention that can be differentiated twice."""

    def in_math() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return run()

    return Cure(MATH, in_math)


def of_the_order(task_loss: TaskLoss, run: Callable[[TaskLoss], object], /) -> Iterator[Cure]:
    """No second derivative, where there is one."""
    if task_loss.first_order is not None:
        changed = replace(task_loss, function=task_loss.first_order)
        yield Cure("first_order=True, which takes no second derivative", partial(run, changed))


def of_a_loop(
    loss: Callable[[PyTree, PyTree], Tensor], params: PyTree, task: PyTree, advice: str, /
) -> Cure:
    """A loop of the user's own, which has the loss function run by autograd alone."""

    def gradient() -> None:
        leaves = [leaf.detach().requires_grad_() for leaf in tree_leaves(params)]
        with torch.enable_grad():
            value = loss(tree_unflatten(leaves, tree_structure(params)), task)
        torch.autograd.grad(value, leaves, allow_unused=True)

    return Cure(advice, gradient)


def few(tasks: PyTree, /) -> PyTree:
    """The tasks that a cure is tried on."""
    return tree_map(lambda leaf: leaf[:FEW], tasks)


def uncompiled(cures: Iterator[Cure], /) -> Iterator[Cure]:
    """Cures of a compiled step, which are tried without torch.compile and advised so."""
    for cure in cures:
        yield Cure(f"compile=False and {cure.advice}", cure.trial)


def one_of(tasks: PyTree, /) -> PyTree:
    """The first task, without its task axis."""
    return tree_map(lambda leaf: leaf[0], tasks)


@contextmanager
def explaining(
    by: str, n: int, source: object, cures: Callable[[], Iterator[Cure]], /, *, without: str
) -> Iterator[None]:
    """Turns what torch raises in the block into one sentence that says what to do.

    An error that comes again under every cure is the loss function's own, and raised as it is.

    Args:
        by: what runs the model.
        n: tasks that it runs at once.
        source: the loss function, or what it is made of: left as it is found by the trials.
        cures: what may help, the best first.
        without: what runs the model task by task, for a lack of memory.

    Raises:
        RuntimeError: as said.
    """
    try:
        yield
    except RankLostError:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise without_memory(error, by, n, without=without) from error
        advice = first_that_helps(cures(), source)
        if advice is None:
            raise
        if isinstance(error, SharedDrawsError) and advice.startswith("chunk_size=1"):
            advice = "chunk_size=1, where every task draws for itself, or randomness='same'"
        raise explained(error, by, advice) from error


def first_that_helps(cures: Iterable[Cure], source: object, /) -> str | None:
    """The advice of the first cure whose trial runs, or None.

    Args:
        cures: the best first.
        source: the loss function, or what it is made of: left as it is found by the trials.
    """
    model, state = Model(source), RandomState(source=source)
    return next((cure.advice for cure in cures if _helps(cure, model, state)), None)


def _helps(cure: Cure, model: Model, state: RandomState) -> bool:
    try:
        cure.trial()
    except Exception:
        return False
    finally:
        model.restore()
        model.restore_wrapped()
        state.restore()
    return True
