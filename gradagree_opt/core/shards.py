"""Parameters of which each rank holds a part, as FSDP2 and tensor parallelism lay them out.

The ranks of one mesh have the same tasks, and each holds a part of their gradients: a sum over all
parameters is a sum over these ranks too. A leaf that several of them hold whole is counted by the
first. Ranks of other meshes that hold the same part have other tasks.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.header import Header
from gradagree_opt.core.lost import reduce_over
from gradagree_opt.core.own_part import Part
from gradagree_opt.core.stacks import PyTree, tree_norm

ALONE = object()
"""In place of a process group: no other rank has the same part."""


class Shards:
    """The ranks that share the tasks of this one, and which of the leaves this one counts.

    Args:
        leaves: plain or DTensors ``[n, *shape]``.
        group: of all ranks that take part, for the messages.

    Attributes:
        index: the place of this rank among those that share its tasks.
        block: what these have in common, and no others have.
        peers: process group of those with the same part, this one among them.
    """

    def __init__(self, leaves: Sequence[Tensor], group: Any) -> None:
        self.group = group
        self.peers: Any = group
        self._leaves = leaves
        self._mesh: Any = None
        self.index, self.block = 0, -1
        for leaf in leaves:
            if is_sharded(leaf):
                mesh = leaf.device_mesh  # type: ignore[attr-defined]
                if self._mesh is not None and mesh != self._mesh:
                    raise ValueError(
                        "expected parameters on one device mesh, found two; give each its own "
                        "optimizer and TaskBatch"
                    )
                self._mesh = mesh
                _placements(leaf, -1)
        if self:
            ranks = self._mesh.mesh.flatten().tolist()
            everyone = torch.distributed.group.WORLD if group is None else group
            members = torch.distributed.get_process_group_ranks(everyone)
            missing = sorted(set(ranks).difference(members))
            if missing:
                raise ValueError(
                    "expected a process group with all ranks of the mesh that the parameters lie "
                    f"on, found none of its rank {missing[0]}; give ga.distributed a group of "
                    "whole meshes, or none"
                )
            self.block = min(ranks)
            self.index = ranks.index(torch.distributed.get_rank())

    def __bool__(self) -> bool:
        """Whether there are any; if not, each rank holds its tasks whole."""
        return self._mesh is not None

    def shapes(self, leaves: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Shapes of the leaves of one task, over all ranks that share it."""
        return [tuple(leaf.shape[1:]) for leaf in (self._leaves if self else leaves)]

    def meet(self, table: Sequence[Header], groups: dict[tuple[int, ...], Any]) -> list[int]:
        """How many tasks each rank counts, by all headers; finds the ranks with the same part too.

        Args:
            table: the headers of all ranks.
            groups: process groups made so far, by their ranks; a new one is added.

        Raises:
            ValueError: ranks that share their tasks have different numbers of them.
        """
        if not self:
            return [header.n for header in table]
        numbers: dict[int, int] = {}
        for rank, header in enumerate(table):
            if (other := numbers.setdefault(header.block, header.n)) != header.n:
                raise ValueError(
                    "expected the same tasks on all ranks that share parameters, found "
                    f"{other} and, on rank {rank}, {header.n}; deal tasks out over meshes"
                )
        ranks = [rank for rank, header in enumerate(table) if header.part == self.index]
        key = tuple(_global_rank(self.group, rank) for rank in ranks)
        if len(key) > 1 and not _is_there(groups.get(key)):
            groups[key] = torch.distributed.new_group(list(key), use_local_synchronization=True)
        self.peers = groups[key] if len(key) > 1 else ALONE
        return [0 if header.part else header.n for header in table]

    def first(self, table: Sequence[Header], rank: int) -> int:
        """The rank that counts the tasks of this one."""
        if not self:
            return rank
        pairs = [(header.block, header.part) for header in table]
        return pairs.index((self.block, 0))

    def add_up(self, tensor: Tensor) -> None:
        """Sums over the ranks with the same part and other tasks, in place."""
        if self.peers is not ALONE:
            reduce_over(tensor, self.peers, self.group)

    def counted(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The own parts, without the columns of those that another rank counts."""
        if not self:
            return list(leaves)
        coordinates = self._mesh.get_coordinate()
        result = []
        for leaf, whole in zip(leaves, self._leaves, strict=True):
            sharded = [False] * len(coordinates)
            if is_sharded(whole):
                sharded = [each.is_shard() for each in whole.placements]  # type: ignore[attr-defined]
            first = all(there or not at for there, at in zip(sharded, coordinates, strict=True))
            result.append(leaf if first else leaf.reshape(len(leaf), leaf[:1].numel())[:, :0])
        return result

    def unify(self, parts: Sequence[Part]) -> None:
        """Gives tasks the units and the lengths that they have over all their parts."""
        if not self:
            return
        for part in parts:
            own = part.units
            part.units = self.largest(own)
            squares = (part.lengths * (own / or_one(part.units))).square()
            part.lengths = self.sum(squares).sqrt()

    def norm(self, leaves: Sequence[Tensor]) -> Tensor:
        """Norm of a vector over all its parts; these are the ones that this rank counts."""
        own = tree_norm([*leaves])
        if not self:
            return own
        unit = or_one(self.largest(own.nan_to_num(0.0, 0.0, 0.0)))
        return unit * self.sum((own / unit).square()).sqrt()

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest of each entry, over the ranks that share the tasks."""
        return self._reduced(tensor, torch.distributed.ReduceOp.MAX)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of each entry, over the ranks that share the tasks."""
        return self._reduced(tensor, torch.distributed.ReduceOp.SUM)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if not self:
            return tensor
        tensor = tensor.clone()
        for group in self._mesh.get_all_groups():
            reduce_over(tensor, group, self.group, operation)
        return tensor

    def whole(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The own parts of an update as DTensors, where the stack had these."""
        pairs = zip(leaves, self._leaves, strict=True)
        return [_whole(leaf, stack, -1, stack.shape[1:]) for leaf, stack in pairs]


def _is_there(group: Any) -> bool:
    """Whether a process group was made and not destroyed since."""
    try:
        return group is not None and torch.distributed.get_rank(group) >= 0
    except ValueError:
        return False


def _global_rank(group: Any, rank: int) -> int:
    return rank if group is None else torch.distributed.get_global_rank(group, rank)


def is_sharded(tensor: Tensor, /) -> bool:
    """Whether it is a DTensor; there is none where nobody has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor, /) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def are_sharded(parameters: Mapping[str, Tensor], /) -> bool:
    """Whether some are DTensors."""
    return any(map(is_sharded, parameters.values()))


def stack_tasks(tasks: Sequence[dict[str, Tensor]], /) -> dict[str, Tensor]:
    """Stacks the tensors of all tasks, and takes them out of these, so that each is held once."""
    return {name: _stack([task.pop(name) for task in tasks]) for name in [*tasks[0]]}


def of_no_task(like: PyTree, /) -> PyTree:
    """A task-stacked pytree of zero tasks, whose leaves are otherwise like these."""

    def empty(leaf: Tensor) -> Tensor:
        own = local_part(leaf.detach()).unsqueeze(0)[:0]
        return _whole(own, leaf, 1, (0, *leaf.shape))

    return tree_map(empty, like)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, for DTensors without communication."""
    stack = torch.stack([local_part(tensor) for tensor in tensors])
    return _whole(stack, tensors[0], 1, (len(tensors), *tensors[0].shape))


def _whole(own: Tensor, like: Tensor, by: int, shape: Sequence[int]) -> Tensor:
    if not is_sharded(like):
        return own
    result: Tensor = type(like).from_local(  # type: ignore[attr-defined]
        own,
        like.device_mesh,  # type: ignore[attr-defined]
        _placements(like, by),
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
    return result


def _placements(tensor: Any, by: int) -> list[Any]:
    """The placements of a DTensor with a task axis more (``by=1``) or less (``by=-1``)."""
    from torch.distributed.tensor import Replicate, Shard

    result: list[Any] = []
    for each in tensor.placements:
        if type(each) is Shard:
            result.append(Shard(each.dim + by))
        elif isinstance(each, Replicate):
            result.append(each)
        else:
            raise ValueError(
                f"expected parameters that are sharded or replicated, found {each} on a mesh "
                "dimension; redistribute them, or leave tensor parallelism out of fully_shard"
            )
    return result
