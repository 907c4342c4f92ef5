"""What Equal Agreement costs: its aggregation, and a Reptile step on sines, beside the others'."""

from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

import gradagree_opt as ga
from gradagree_opt.ablation.training.networks import mlp

from .timing import Bar, Case, Contestant, Step


class Size(NamedTuple):
    """Tasks, entries of each, and leaves of unequal size that these lie in."""

    tasks: int
    entries: int
    leaves: int

    def __str__(self) -> str:
        return f"{self.tasks} tasks of {self.entries:.2g}"


SIZES = (Size(64, 2_000_000, 60), Size(8, 120_000, 18), Size(64, 4400, 6), Size(10, 4400, 6))
AGGREGATORS = {"mean": ga.Mean, "agreement": ga.GradientAgreement, "equal": ga.EqualAgreement}


def case() -> Case:
    torch.manual_seed(0)
    stacks = {size: gradients(size) for size in SIZES}
    return Case(
        "equal-agreement",
        "Equal Agreement beside Gradient Agreement and the mean: aggregation alone, and a compiled "
        "Reptile step of the sine study (10 tasks, five steps of ten points, MLP 1-64-64-1)",
        [
            *[
                Contestant(f"{size}, {name}", partial(aggregate, stacks[size], name), False)
                for size, name in product(SIZES, AGGREGATORS)
            ],
            *[
                Contestant(f"Reptile step, {name}", partial(reptile, name), False)
                for name in AGGREGATORS
            ],
        ],
        [Bar(f"{size}, equal", f"{size}, agreement", 1.5) for size in SIZES],
    )


def gradients(size: Size) -> dict[str, Tensor]:
    shares = torch.logspace(0, 2, size.leaves)
    sizes = (size.entries * shares / shares.sum()).int().tolist()
    return {f"{index:02}": torch.randn(size.tasks, d) + 0.1 for index, d in enumerate(sizes)}


def aggregate(stack: dict[str, Tensor], name: str) -> Step:
    return partial(AGGREGATORS[name](), stack)


def reptile(name: str) -> Step:
    module = mlp([1, 64, 64, 1], torch.nn.Tanh)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return ((functional_call(module, params, (x,)) - y) ** 2).mean()

    x = torch.rand(10, 50, 1) * 10 - 5
    tasks = {"support": (x, torch.sin(x + torch.rand(10, 1, 1)))}
    learner = ga.Reptile(loss_fn, ga.InnerSGD(0.02, 5, batch_size=10), compile=True)
    aggregator = AGGREGATORS[name](nonfinite="propagate")
    return lambda: learner.step(params, tasks, aggregator).update
