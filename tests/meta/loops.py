"""The papers' meta-algorithms as loops of torch.autograd over one task after the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradagree_opt as ga

from .rules import Named, flat

LossFn = Callable[[Any, Any], Tensor]


class Task(NamedTuple):
    """What one task contributes to an outer step."""

    displacement: Named
    direction: Named
    loss: Tensor


def gradient(loss_fn: LossFn, params: Named, batch: Any) -> Named:
    """∇L, a constant."""
    params = fresh(params)
    grads = torch.autograd.grad(loss_fn(params, batch), list(params.values()))
    return dict(zip(params, grads, strict=True))


def gradient_with_graph(loss_fn: LossFn, params: Named, batch: Any) -> Named:
    """∇L, differentiable in the parameters."""
    grads = torch.autograd.grad(loss_fn(params, batch), list(params.values()), create_graph=True)
    return dict(zip(params, grads, strict=True))


def descend(
    gradient_of: Callable[[Named], Named], params: Named, rates: Mapping[str, Any], steps: int
) -> list[Named]:
    """k steps θ ← θ − α ∘ ∇L(θ): the parameters before the first, after the first, …"""
    visited = [params]
    for _ in range(steps):
        grads = gradient_of(params)
        params = {name: p - rates[name] * grads[name] for name, p in params.items()}
        visited.append(params)
    return visited


def fresh(params: Named) -> Named:
    return {name: p.detach().clone().requires_grad_() for name, p in params.items()}


def moved(before: Named, after: Named) -> Named:
    return {name: (before[name] - after[name]).detach() for name in before}


def maml(loss_fn: LossFn, params: Named, task: Any, lr: float, steps: int) -> Task:
    """Finn et al. 2017, algorithm 1: ∇_θ L(θ_i), through the inner loop."""
    params = fresh(params)
    inner = partial(gradient_with_graph, loss_fn, batch=task["support"])
    adapted = descend(inner, params, dict.fromkeys(params, lr), steps)[-1]
    loss = loss_fn(adapted, task["query"])
    grads = torch.autograd.grad(loss, list(params.values()))
    return Task(moved(params, adapted), dict(zip(params, grads, strict=True)), loss.detach())


def fomaml(loss_fn: LossFn, params: Named, task: Any, lr: float, steps: int) -> Task:
    """Finn et al. 2017, section 5.2: ∇L at θ_i."""
    inner = partial(gradient, loss_fn, batch=task["support"])
    adapted = descend(inner, params, dict.fromkeys(params, lr), steps)[-1]
    direction = gradient(loss_fn, adapted, task["query"])
    return Task(moved(params, adapted), direction, loss_fn(adapted, task["query"]).detach())


def reptile(loss_fn: LossFn, params: Named, task: Any, lr: float, steps: int) -> Task:
    """Nichol et al. 2018, algorithm 1, with the sign of a descent gradient."""
    displacement, _, loss = fomaml(loss_fn, params, task, lr, steps)
    return Task(displacement, displacement, loss)


def meta_sgd(loss_fn: LossFn, meta: Any, task: Any, lr: float, steps: int) -> Task:
    """Li et al. 2017, algorithm 1: the rates are trained beside the parameters."""
    params, rates = fresh(meta["params"]), fresh(meta["lr"])
    inner = partial(gradient_with_graph, loss_fn, batch=task["support"])
    adapted = descend(inner, params, rates, steps)[-1]
    loss = loss_fn(adapted, task["query"])
    trained = flat({"params": params, "lr": rates})
    grads = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    return Task(moved(params, adapted), dict(zip(trained, grads, strict=True)), loss.detach())


def first_order_meta_sgd(loss_fn: LossFn, meta: Any, task: Any, lr: float, steps: int) -> Task:
    """Li et al. 2017 with constant inner gradients g_t: ∂L/∂α = −(Σ_t g_t) ∘ ∇L(θ_i)."""
    params = meta["params"]
    inner = partial(gradient, loss_fn, batch=task["support"])
    visited = descend(inner, params, meta["lr"], steps)
    at_query = gradient(loss_fn, visited[-1], task["query"])
    slopes = {name: torch.zeros_like(p) for name, p in params.items()}
    for at in visited[:-1]:
        slopes = {name: slopes[name] - g * at_query[name] for name, g in inner(at).items()}
    loss = loss_fn(visited[-1], task["query"]).detach()
    return Task(moved(params, visited[-1]), flat({"params": at_query, "lr": slopes}), loss)


@dataclass(frozen=True)
class Algorithm:
    """A meta-algorithm of the library, and the same as a loop over one task."""

    build: Callable[..., Any]
    one_task: Callable[[LossFn, Any, Any, float, int], Task]
    signal: str = "displacement"
    learns_rates: bool = False

    @property
    def takes_groups(self) -> bool:
        """Whether every leaf has a signal: a displacement has none for rates that are trained."""
        return not self.learns_rates or self.signal == "gradient"

    def tasks(
        self, loss_fn: LossFn, params: Any, tasks: list[Any], lr: float, steps: int
    ) -> tuple[list[Named], list[Named], list[Tensor]]:
        """Signals, directions and losses, task by task."""
        each = [self.one_task(loss_fn, params, task, lr, steps) for task in tasks]
        directions = [task.direction for task in each]
        displacements = [task.displacement for task in each]
        signals = displacements if self.signal == "displacement" else directions
        return signals, directions, [task.loss for task in each]


def build_maml(loss_fn: LossFn, lr: float, steps: int, **options: Any) -> ga.MAML:
    return ga.MAML(loss_fn, ga.InnerSGD(lr, steps), **options)


def build_meta_sgd(loss_fn: LossFn, lr: float, steps: int, **options: Any) -> ga.MetaSGD:
    return ga.MetaSGD(loss_fn, steps, **options)


def build_reptile(loss_fn: LossFn, lr: float, steps: int, **options: Any) -> ga.Reptile:
    return ga.Reptile(loss_fn, ga.InnerSGD(lr, steps), **options)


ALGORITHMS = {
    "MAML": Algorithm(partial(build_maml, signal="displacement"), maml),
    "FOMAML": Algorithm(partial(build_maml, first_order=True, signal="displacement"), fomaml),
    "MAML on gradients": Algorithm(partial(build_maml, signal="gradient"), maml, "gradient"),
    "FOMAML on gradients": Algorithm(
        partial(build_maml, first_order=True, signal="gradient"), fomaml, "gradient"
    ),
    "Meta-SGD": Algorithm(
        partial(build_meta_sgd, signal="displacement"), meta_sgd, learns_rates=True
    ),
    "first-order Meta-SGD": Algorithm(
        partial(build_meta_sgd, first_order=True, signal="displacement"),
        first_order_meta_sgd,
        learns_rates=True,
    ),
    "Meta-SGD on gradients": Algorithm(
        partial(build_meta_sgd, signal="gradient"), meta_sgd, "gradient", learns_rates=True
    ),
    "Reptile": Algorithm(build_reptile, reptile),
}
