"""Optimizers as pure functions, so that runs of different outer rates, and tasks, step as one."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.ablation.section import Optimizer
from gradagree_opt.ablation.training.networks import Params

State: TypeAlias = dict[str, Any]
MOMENTUM = 0.9
DECAYS = (0.9, 0.999)
EPSILON = 1e-8


class OuterOptimizer(NamedTuple):
    """The state before the first step, and ``step(params, update, state, rate)``."""

    initial: Callable[[Params], State]
    step: Callable[[Params, Params, State, Tensor], tuple[Params, State]]


def sgd(params: Params, update: Params, state: State, rate: Tensor) -> tuple[Params, State]:
    return tree_map(lambda p, u: p - rate * u, params, update), state


def momentum_state(params: Params) -> State:
    return {"velocity": tree_map(torch.zeros_like, params)}


def momentum(params: Params, update: Params, state: State, rate: Tensor) -> tuple[Params, State]:
    """Polyak 1964 as PyTorch has it: the rate is a factor of the velocity, not of its parts."""
    velocity = tree_map(lambda v, u: MOMENTUM * v + u, state["velocity"], update)
    return tree_map(lambda p, v: p - rate * v, params, velocity), {"velocity": velocity}


def adam_state(params: Params) -> State:
    zeros = tree_map(torch.zeros_like, params)
    return {"mean": zeros, "square": zeros, "steps": torch.zeros(())}


def adam(
    params: Params,
    update: Params,
    state: State,
    rate: Tensor | float,
    decays: Sequence[float] = DECAYS,
) -> tuple[Params, State]:
    """Kingma and Ba 2015, algorithm 1, with PyTorch's default options."""
    steps = state["steps"] + 1
    first, second = decays
    mean = tree_map(lambda m, u: first * m + (1 - first) * u, state["mean"], update)
    square = tree_map(lambda v, u: second * v + (1 - second) * u * u, state["square"], update)
    # 1 - decay**steps cancels in float32 during the first steps.
    logs = (math.log(decay) if decay else -math.inf for decay in decays)
    mean_bias, square_bias = (-torch.expm1(steps * log) for log in logs)
    params = tree_map(
        lambda p, m, v: p - rate / mean_bias * m / ((v / square_bias).sqrt() + EPSILON),
        params,
        mean,
        square,
    )
    return params, {"mean": mean, "square": square, "steps": steps}


OPTIMIZERS: dict[Optimizer, OuterOptimizer] = {
    "sgd": OuterOptimizer(lambda _: {}, sgd),
    "momentum": OuterOptimizer(momentum_state, momentum),
    "adam": OuterOptimizer(adam_state, adam),
}
