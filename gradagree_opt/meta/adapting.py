"""Adaptation to one task, with checks of its arguments and errors that say what to do."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradagree_opt.batchnorm import statistics_refused
from gradagree_opt.core.stacks import PyTree, check_floating
from gradagree_opt.engines.cures import Cure, first_that_helps, of_a_loop, one_of
from gradagree_opt.engines.errors import explained, is_ours, is_out_of_memory
from gradagree_opt.engines.kept import left_as_found
from gradagree_opt.engines.losses import LossFn
from gradagree_opt.engines.meant import are_whole, in_floats
from gradagree_opt.one_process import check_whole

_LOOP = "an inner loop of your own, by torch.autograd.grad"


def adapt_to(
    support: PyTree,
    adapt: Callable[[PyTree], PyTree],
    params: PyTree,
    loss: LossFn,
    source: object,
    /,
) -> PyTree:
    """Calls ``adapt(support)``, and puts back what that changes in the model.

    Args:
        support: the support set of one task.
        adapt: from a support set to adapted parameters.
        params: that it starts from.
        loss: of the parameters and a batch.
        source: what the loss function and the inner loop are made of.

    Raises:
        TypeError: a parameter is not floating-point.
        ValueError: the loss function takes the support set of one task and was given that of
            several, or the whole task; the model changes its buffers; a parameter lies in parts on
            several ranks.
        RuntimeError: torch.func cannot run the model.
    """
    check_floating(params, "parameters")
    check_whole(tree_leaves(params))
    try:
        with statistics_refused(), left_as_found(source):
            return adapt(support)
    except Exception as error:
        if is_ours(error) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            raise
        # An error that does not come again says nothing of the support set.
        cures = [Cure("", lambda: adapt(support)), *_parts(support, adapt)]
        part = first_that_helps(cures, source)
        if part == "":
            raise
        if part is not None:
            found = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"expected the support set of one task, found what the loss function does not take "
                f"({found}); give {part}"
            ) from error
        if not isinstance(error, RuntimeError):
            raise
        advice = first_that_helps([of_a_loop(loss, params, support, _LOOP)], source)
        if advice is None:
            raise
        raise explained(error, "adapt()", advice) from error


def _parts(support: PyTree, adapt: Callable[[PyTree], PyTree]) -> Iterator[Cure]:
    """What the user may have meant to give: parts and forms of the support set."""
    if isinstance(support, Mapping) and "support" in support:
        yield Cure("task['support']", lambda: adapt(support["support"]))
    leaves = tree_leaves(support)
    stacked = all(isinstance(leaf, Tensor) and leaf.ndim > 1 for leaf in leaves)
    if stacked and len({leaf.shape[0] for leaf in leaves}) == 1:
        advice = "one task, without the task axis, as tree_map(lambda leaf: leaf[0], support)"
        yield Cure(advice, lambda: adapt(one_of(support)))
    if are_whole(support):
        advice = "floating-point tensors, as support.float()"
        yield Cure(advice, lambda: adapt(in_floats(support)))
