"""Implicit MAML by hand on sine curves: no graph of the inner loop, the mean over the tasks."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import mse_loss

TASKS = 8
SHOTS = 10
STRENGTH = 5.0
INNER_RATE, INNER_STEPS, SOLVER_STEPS = 0.02, 8, 5

Batch = tuple[Tensor, Tensor]
Params = dict[str, Tensor]


def sample(draws: torch.Generator) -> tuple[Batch, Batch]:
    """Support and query set of one sine curve."""
    amplitude, phase = torch.rand(2, generator=draws)
    x = 10 * torch.rand(2, SHOTS, 1, generator=draws) - 5
    y = (1 + amplitude) * torch.sin(x + math.pi * phase)
    return (x[0], y[0]), (x[1], y[1])


def task_loss(params: Params, model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return mse_loss(functional_call(model, params, (x,)), y)


def adapt(model: nn.Module, theta: Params, support: Batch) -> Params:
    """Minimises the support loss and STRENGTH / 2 times the squared distance from theta."""
    params = theta
    for _ in range(INNER_STEPS):
        grads = grad(task_loss)(params, model, support)
        params = {
            name: p - INNER_RATE * (grads[name] + STRENGTH * (p - theta[name]))
            for name, p in params.items()
        }
    return params


def dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def plus(a: Params, factor: Tensor, b: Params) -> Params:
    return {name: a[name] + factor * b[name] for name in a}


def meta_gradient(model: nn.Module, adapted: Params, support: Batch, query: Batch) -> Params:
    """(I + H / STRENGTH)⁻¹ times the query gradient, H that of the support loss, by CG."""

    def curved(vector: Params) -> Params:
        """H times a vector."""
        return grad(lambda params: dot(grad(task_loss)(params, model, support), vector))(adapted)

    residual = grad(task_loss)(adapted, model, query)
    solution = {name: torch.zeros_like(p) for name, p in residual.items()}
    search, squared = residual, dot(residual, residual)
    for _ in range(SOLVER_STEPS):
        product = plus(search, torch.tensor(1 / STRENGTH), curved(search))
        length = squared / dot(search, product)
        solution = plus(solution, length, search)
        residual = plus(residual, -length, product)
        before, squared = squared, dot(residual, residual)
        search = plus(residual, squared / before, search)
    return solution


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    history = []
    for _ in range(iterations):
        theta = {name: p.detach() for name, p in model.named_parameters()}
        tasks = [sample(draws) for _ in range(TASKS)]
        adapted = [adapt(model, theta, support) for support, _ in tasks]
        losses = [task_loss(p, model, query) for p, (_, query) in zip(adapted, tasks, strict=True)]
        found = [meta_gradient(model, p, *task) for p, task in zip(adapted, tasks, strict=True)]
        directions = {name: torch.stack([each[name] for each in found]) for name in theta}
        update = {name: each.mean(0) for name, each in directions.items()}
        for name, p in model.named_parameters():
            p.grad = update[name]
        optimizer.step()
        history.append(torch.stack(losses).mean().item())
    return history


if __name__ == "__main__":
    print(*main(), sep="\n")
