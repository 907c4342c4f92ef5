"""Small regression tasks for loops over learners, and what such loops should give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

RATE = 0.1
STEPS = 3
TASKS = 4
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def draw(n: int = TASKS, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Tasks of one teacher, each with a shift of its own: they agree in part."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, n, 7, 3, generator=generator, dtype=torch.float64)
    shift = torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    y = torch.sin(x.sum(-1, keepdim=True)) + 1 + shift
    return tree_map(lambda t: t.to(dtype), {"support": (x[0], y[0]), "query": (x[1], y[1])})


def each(tasks: dict[str, Any]) -> list[dict[str, Any]]:
    return [tree_map(lambda leaf, i=i: leaf[i], tasks) for i in range(len(tasks["query"][0]))]


def mse(learner: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return ((learner(x) - y) ** 2).mean()


def functional(net: nn.Module) -> Callable[[Any, Any], Tensor]:
    """The same loss of parameters by name."""
    return lambda params, batch: mse(lambda x: torch.func.functional_call(net, params, (x,)), batch)


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def vector(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def grads(module: nn.Module) -> Tensor:
    """All of .grad as one vector, zeros where there is none."""
    return vector(torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters())


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    found, expected = found.double(), expected.double()
    assert expected.norm() > 0
    apart = (found - expected).norm() / expected.norm()
    assert apart <= tolerance, f"{apart:.1e}"
