"""Errors of a loss function that is given tasks in the wrong form: says which form it takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from gradagree_opt.core.lost import RankLostError
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.engines.cures import first_that_helps, of_a_loop, one_of
from gradagree_opt.engines.errors import is_ours, is_out_of_memory
from gradagree_opt.engines.losses import LossFn


@contextmanager
def naming_what_was_meant(
    loss: LossFn, params: PyTree, tasks: PyTree, source: object, /
) -> Iterator[None]:
    """Explains an error of a loss function that would take the tasks in another form.

    A list of tensors may be one task as well as a list of tasks, which the loss function alone can
    tell. So after an error it is tried: on what one task would be, then on the other forms.

    Args:
        loss: ``loss(params, batch)`` of one task.
        params: pytree of floating-point tensors.
        tasks: task-stacked pytree, or what was given for one.
        source: what the loss function is made of: left as it is found by the trials.

    Raises:
        ValueError: as said.
    """
    try:
        yield
    except Exception as error:
        memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
        if memory or isinstance(error, RankLostError) or is_ours(error):
            raise

        def takes(batch: PyTree) -> bool:
            return first_that_helps([of_a_loop(loss, params, batch, "")], source) is not None

        if takes(one_of(tasks)):
            raise
        found = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        first = _first_of_list(tasks)
        if first is not None and takes(first):
            kind = type(tasks).__name__
            raise ValueError(
                f"expected a task-stacked pytree, found a {kind} of {len(tasks)} tasks, of which "
                f"the loss function takes each by itself ({found}); give one pytree whose every "
                "tensor is torch.stack(…) of those of the tasks, or loop with TaskBatch"
            ) from error
        if are_whole(tasks) and takes(in_floats(one_of(tasks))):
            names = ", ".join(sorted({str(leaf.dtype) for leaf in tree_leaves(tasks)}))
            raise ValueError(
                f"expected tasks that the loss function takes, found {names} alone ({found}); give "
                "floating-point tensors, as tasks.float()"
            ) from error
        raise


def are_whole(batch: PyTree, /) -> bool:
    """Whether a batch has tensors of integers alone."""
    return all(
        isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex())
        for leaf in tree_leaves(batch)
    )


def in_floats(batch: PyTree, /) -> PyTree:
    """The batch in the default floating-point dtype.

    >>> in_floats({"x": torch.tensor([1, 2])})
    {'x': tensor([1., 2.])}
    """
    return tree_map(lambda leaf: leaf.to(torch.get_default_dtype()), batch)


def _first_of_list(tasks: PyTree) -> PyTree | None:
    """The first of tasks that may be a list of them: all have one form; None where they are not."""
    if type(tasks) not in (list, tuple):
        return None
    forms = [(tree_structure(task), [leaf.shape for leaf in tree_leaves(task)]) for task in tasks]
    return tasks[0] if all(form == forms[0] for form in forms) else None
