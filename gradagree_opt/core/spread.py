"""What a user calls to spread tasks over ranks: an aggregator of all, and one rank's share."""

import copy
from typing import Any, TypeVar

from torch.utils._pytree import tree_map

from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.ranks import Ranks
from gradagree_opt.core.stacks import PyTree, task_count

AnAggregator = TypeVar("AnAggregator", bound=Aggregator)


def distributed(aggregator: AnAggregator, /, group: Any = None) -> AnAggregator:
    """The aggregator, over the tasks of all ranks of a process group.

    Every rank gives its own tasks, however many, even none. The update and the diagnostics are
    those of the tasks of all, the same bits on every rank; weights, scores and losses are those of
    the rank's own tasks. It can stand wherever the aggregator can, except with ``compile=True``, in
    TorchOpt's ``weighted_loss`` and for those of TorchJD that need the gradients themselves.
    Replicas stay equal if they begin equal: by the same seed, a broadcast or
    DistributedDataParallel.

    Every call of an aggregation has to be made on all ranks. If one fails before it, all raise.
    The process group of all ranks may be made later, as by Lightning, but before the first step.

    Args:
        aggregator: any but those that need the gradients themselves.
        group: process group; None for all ranks.

    Raises:
        TypeError: it is no aggregator; or, when it is pickled, it has a group of its own.
        ValueError: this rank is not in the group, or the aggregator needs the gradients of all
            tasks on one rank; or, at a step, there is no process group.

    >>> import tempfile
    >>> import torch
    >>> import torch.distributed as dist
    >>> import gradagree_opt as ga
    >>> store = dist.FileStore(tempfile.mkstemp()[1], 1)
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> aggregator = ga.distributed(ga.GradientAgreement())
    >>> aggregator(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -1.0]]))
    tensor([1.6667, 0.3333])
    >>> dist.destroy_process_group()
    """
    check_aggregator(aggregator)
    if "directions" in aggregator.needs:
        raise ValueError(
            f"expected an aggregator that weights the tasks, found {aggregator!r}, which needs the "
            "gradients of all of them on one rank; gather them, and aggregate without distributed"
        )
    spread = copy.copy(aggregator)
    spread.ranks = Ranks(group)
    return spread


def own_share(tasks: PyTree, /, group: Any = None) -> PyTree:
    """The tasks of this rank out of a task-stacked batch: as ``tensor_split`` deals them out.

    Sizes differ by one at most; ranks get none where there are fewer tasks than ranks. Tasks are
    dealt by their number, so that any number of ranks sees the same ones.

    Args:
        tasks: pytree with leaves ``[n, *shape]``, the same on all ranks.
        group: process group; None for all ranks.

    Raises:
        ValueError: there is no process group, this rank is not in it, or the task axes differ.

    >>> import torch
    >>> from torch.distributed import HashStore, destroy_process_group, init_process_group
    >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    >>> own_share(torch.tensor([1.0, 2.0]))  # a single rank has all tasks
    tensor([1., 2.])
    >>> destroy_process_group()
    """
    ranks = Ranks(group)
    ranks.check_group()
    task_count(tasks, "tasks")
    return tree_map(lambda leaf: leaf.tensor_split(ranks.size)[ranks.rank], tasks)
