"""Multi-task regression with a functional optimizer, from one gradient a task."""

import torch
import torchopt
from gradagree_opt.adapters.torchopt import aggregate
from torch import Tensor
from torch.func import grad_and_value, vmap

import gradagree_opt as ga

TASKS = 6
INPUTS = 4
EXAMPLES = 16
HIDDEN = 32

Params = dict[str, Tensor]


def loss_fn(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return ((torch.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2).mean()


def main(iterations: int = 200) -> list[float]:
    draws = torch.Generator().manual_seed(0)
    shared = torch.randn(INPUTS, 1, generator=draws)
    slopes = shared + 0.5 * torch.randn(TASKS, INPUTS, 1, generator=draws)
    params = {
        "hidden": torch.randn(INPUTS, HIDDEN, generator=draws) / INPUTS**0.5,
        "out": torch.randn(HIDDEN, 1, generator=draws) / HIDDEN**0.5,
    }
    optimizer = torchopt.chain(aggregate(ga.GradientAgreement()), torchopt.adam(lr=0.01))
    state = optimizer.init(params)
    history = []
    for _ in range(iterations):
        x = torch.randn(TASKS, EXAMPLES, INPUTS, generator=draws)
        y = torch.tanh(x @ slopes)
        gradients, losses = vmap(grad_and_value(loss_fn), (None, 0, 0))(params, x, y)
        updates, state = optimizer.update(gradients, state, params=params)
        params = torchopt.apply_updates(params, updates)
        history.append(losses.mean().item())
    return history


if __name__ == "__main__":
    print(*main(), sep="\n")
