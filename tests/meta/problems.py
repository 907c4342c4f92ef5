"""Small random regression problems with a two-layer network, and how their answers are compared."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .rules import Named, flat, length


class Problem(NamedTuple):
    """Parameters, rates and n tasks; ``meta`` is what the algorithm named trains."""

    params: Named
    rates: Named
    tasks: dict[str, tuple[Tensor, Tensor]]

    def meta(self, learns_rates: bool) -> Any:
        return {"params": self.params, "lr": self.rates} if learns_rates else self.params

    def task(self, index: int) -> Any:
        return tree_map(lambda leaf: leaf[index], self.tasks)

    def without(self, index: int) -> Any:
        n = self.tasks["support"][0].shape[0]
        return tree_map(lambda leaf: leaf[[i for i in range(n) if i != index]], self.tasks)

    def each(self) -> list[Any]:
        return [self.task(i) for i in range(self.tasks["support"][0].shape[0])]


def loss_fn(params: Named, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of a tanh network with a learned 0-d scale."""
    x, y = batch
    hidden = torch.tanh(x @ params["weight1"] + params["bias1"])
    return ((params["scale2"] * (hidden @ params["weight2"]) - y) ** 2).mean()


def problem(
    n: int = 4,
    *,
    seed: int = 0,
    shots: int = 5,
    inputs: int = 3,
    hidden: int = 4,
    outputs: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Tasks of one teacher, each with a shift of its own: they agree in part."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = {
        "weight1": normal(inputs, hidden) / inputs**0.5,
        "bias1": normal(hidden),
        "weight2": normal(hidden, outputs) / hidden**0.5,
        "scale2": normal().abs() + 0.5,
    }
    rates = {name: 0.02 + 0.1 * normal(*p.shape).abs() for name, p in params.items()}
    teacher = normal(inputs, outputs)
    tasks = {}
    shift = normal(n, 1, outputs)
    for part in ("support", "query"):
        x = normal(n, shots, inputs)
        tasks[part] = (x, torch.sin(x @ teacher) + 2 + shift)
    return Problem(*tree_map(lambda leaf: leaf.to(dtype), (params, rates, tasks)))


def distance(actual: Any, expected: Named) -> float:
    """Euclidean distance of two pytrees of the same names, shapes and dtypes."""
    found = flat(actual)
    assert list(found) == list(expected)
    for name, leaf in expected.items():
        assert (found[name].shape, found[name].dtype) == (leaf.shape, leaf.dtype), name
    return length({name: found[name].double() - expected[name].double() for name in expected})


def assert_same(actual: Any, expected: Named, *, tolerance: float) -> None:
    """No further apart than a share of the expected length."""
    apart, size = distance(actual, expected), length(expected)
    assert apart <= tolerance * size, f"{apart:.1e} of {size:.1e}"
