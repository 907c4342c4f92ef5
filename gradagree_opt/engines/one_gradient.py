"""Norms and products of single gradients, for engines that hold one at a time."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.blocks import or_one
from gradagree_opt.core.scopes import measure_by_group


class One(NamedTuple):
    """What is known of one gradient: whether it is finite, and in each group scale and ‖g‖².

    ``scaled``: whether a scale may be another than 1.
    """

    finite: Bool[Tensor, ""]
    scale: Float[Tensor, "*groups"]
    square: Float[Tensor, "*groups"]
    scaled: bool = True


def measure_one(gradient: Sequence[Tensor], groups: list[int] | None, *, waits: bool) -> One:
    """What is known of a gradient, by its leaves and the group of each.

    ``waits``: whether the host may wait to learn that no scale is needed, which is faster.
    """
    rows = [leaf.unsqueeze(0) for leaf in gradient]
    active = torch.ones(1, dtype=torch.bool, device=rows[0].device)
    measured = measure_by_group(rows, groups, active, frozenset(), scaled=not waits)
    scaled = not waits or not bool(measured.finite.all())
    if waits and scaled:
        measured = measure_by_group(rows, groups, active, frozenset(), scaled=True)
    assert measured.squared_norms is not None
    square = measured.squared_norms.squeeze(-1)
    return One(measured.finite.squeeze(0), measured.scale, square, scaled)


def dot(
    a: Sequence[Tensor],
    of_a: One,
    b: Sequence[Tensor],
    of_b: One,
    groups: list[int] | None,
    scale: Tensor,
) -> Float[Tensor, "*groups"]:
    """Inner product of two gradients in each group, in units of scale², each in its own first."""
    each = [
        torch.dot(x.to(y.dtype).flatten(), y.flatten())
        for x, y in zip(_in_units(a, of_a, groups), _in_units(b, of_b, groups), strict=True)
    ]
    dots = torch.stack(each)
    if groups is None:
        products = dots.sum()
    else:
        members = torch.tensor(groups, device=dots.device)
        products = dots.new_zeros(scale.shape).index_add(0, members, dots)
    shares = [torch.where(of.square == 0, 0, of.scale / scale) for of in (of_a, of_b)]
    return products * shares[0] * shares[1]


def _in_units(gradient: Sequence[Tensor], one: One, groups: list[int] | None) -> Iterator[Tensor]:
    """The leaves in units of their group's scale, one by one."""
    if not one.scaled:
        yield from gradient
        return
    scales = by_leaf(one.scale, groups, len(gradient))
    yield from (leaf / scale for leaf, scale in zip(gradient, scales, strict=True))


def units_of(gradient: Sequence[Tensor], one: One, groups: list[int] | None) -> list[Tensor]:
    """The gradient by its norm in each group; zero for a zero gradient."""
    scale, norm = one.scale, or_one(one.square).sqrt()
    return [
        leaf / s / r
        for leaf, s, r in zip(
            gradient,
            by_leaf(scale, groups, len(gradient)),
            by_leaf(norm, groups, len(gradient)),
            strict=True,
        )
    ]


def by_leaf(values: Tensor, groups: list[int] | None, leaves: int) -> list[Tensor]:
    """The value of every leaf, from one for all or one for each group."""
    return [values if groups is None else values[groups[index]] for index in range(leaves)]
