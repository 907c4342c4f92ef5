"""Matrices [n, d] in float64, whose rows are signals that stand to each other in known ways."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Sampler = Callable[[Generator], Tensor]


def normal(generator: Generator) -> Tensor:
    return _randn(8, 20, generator=generator)


def more_tasks_than_parameters(generator: Generator) -> Tensor:
    return _randn(30, 3, generator=generator)


def low_rank(generator: Generator) -> Tensor:
    return _randn(9, 2, generator=generator) @ _randn(2, 15, generator=generator)


def agreeing(generator: Generator) -> Tensor:
    """All cosines positive."""
    return 1 + 0.3 * _randn(6, 12, generator=generator)


def strongly_stationary(generator: Generator) -> Tensor:
    """There are positive v_i with Σ v_i g_i = 0: no direction descends for all tasks."""
    matrix = _randn(5, 10, generator=generator)
    v = 1 + torch.rand(5, generator=generator, dtype=torch.float64)
    matrix[-1] = -(v[:-1] @ matrix[:-1]) / v[-1]
    return matrix


def opposite(generator: Generator) -> Tensor:
    """Pairs g, −g: the signals add to zero."""
    matrix = _randn(3, 10, generator=generator)
    return torch.stack([matrix, -matrix], dim=1).flatten(0, 1)


def some_zero(generator: Generator) -> Tensor:
    matrix = _randn(7, 10, generator=generator)
    matrix[[0, 3]] = 0
    return matrix


def all_zero(generator: Generator) -> Tensor:
    return torch.zeros(4, 10, dtype=torch.float64)


def unequal_norms(generator: Generator) -> Tensor:
    """Norms over seven decades."""
    return (
        _randn(8, 20, generator=generator) * torch.logspace(-4, 3, 8, dtype=torch.float64)[:, None]
    )


def orthogonal(generator: Generator) -> Tensor:
    """No two rows share a column, so that also rounded rows are exactly orthogonal."""
    blocks = _randn(6, 1, 4, generator=generator)
    return (torch.eye(6, dtype=torch.float64)[:, :, None] * blocks).flatten(1)


def outvoted(generator: Generator) -> Tensor:
    """Four tasks against one three times as large, with noise: a negative weight."""
    matrix = _randn(5, 12, generator=generator) * 0.1 + 1
    matrix[2] *= -3
    return matrix


def single_task(generator: Generator) -> Tensor:
    return _randn(1, 20, generator=generator)


def hundreds_of_tasks(generator: Generator) -> Tensor:
    return 0.2 + _randn(300, 6, generator=generator)


SAMPLERS: tuple[Sampler, ...] = (
    normal,
    more_tasks_than_parameters,
    low_rank,
    agreeing,
    strongly_stationary,
    opposite,
    some_zero,
    all_zero,
    unequal_norms,
    orthogonal,
    outvoted,
    single_task,
    hundreds_of_tasks,
)


def _randn(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
