"""learn2learn's algorithms, and its loop with Gradient Agreement in it."""

from typing import Any

import learn2learn as l2l
import torch
from torch import Tensor, nn

import gradagree_opt as ga

from .learners import RATE, STEPS, each, grads, mse, vector


def _gbml(transform: Any, **fixed: Any) -> Any:
    def make(net: nn.Module, first_order: bool, **options: Any) -> nn.Module:
        dtype = next(net.parameters()).dtype
        with torch.random.fork_rng():
            torch.manual_seed(0)  # ModuleTransform's modules start at random
            gbml = l2l.algorithms.GBML(
                net, transform=transform, lr=RATE, first_order=first_order, **fixed, **options
            )
        return gbml.to(dtype)

    return make


_MODULE = l2l.optim.ModuleTransform(nn.Linear)
_KRONECKER = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)

ALGORITHMS = {
    "MAML": lambda net, first_order, **options: l2l.algorithms.MAML(
        net, lr=RATE, first_order=first_order, **options
    ),
    "MetaSGD": lambda net, first_order: l2l.algorithms.MetaSGD(
        net, lr=RATE, first_order=first_order
    ),
    "GBML": _gbml(_MODULE),
    "GBML adapting": _gbml(_MODULE, adapt_transform=True),
    "Kronecker": _gbml(_KRONECKER),
    "Kronecker adapting": _gbml(_KRONECKER, adapt_transform=True),
}
CASES = [
    (name, first_order)
    for name in ALGORITHMS
    for first_order in (False, True)
    if not (first_order and "adapting" in name)  # learn2learn cannot
]


def adapted(algorithm: Any, task: dict[str, Any], steps: int = STEPS) -> Any:
    """A learner after its inner steps."""
    learner = algorithm.clone()
    for _ in range(steps):
        learner.adapt(mse(learner, task["support"]))
    return learner


def one_by_one(
    algorithm: nn.Module, tasks: dict[str, Any], learned: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Displacement and gradient of one task after the other, by backward()."""
    learned = learned or algorithm
    displacements, gradients = [], []
    for task in each(tasks):
        algorithm.zero_grad()
        learner = adapted(algorithm, task)
        mse(learner, task["query"]).backward()
        gradients.append(grads(algorithm))
        moved = dict(learner.named_parameters())
        displacements.append(vector(p - moved.get(n, p) for n, p in learned.named_parameters()))
    algorithm.zero_grad()
    return torch.stack(displacements), torch.stack(gradients)


def loop(
    algorithm: nn.Module, tasks: dict[str, Any], aggregator: ga.Aggregator, **options: Any
) -> ga.Aggregation:
    batch = ga.TaskBatch(algorithm, aggregator, **options)
    for task in each(tasks):
        learner = adapted(algorithm, task)
        batch.add(mse(learner, task["query"]), adapted=learner)
    return batch.backward()
