"""Multi-task regression in Lightning Fabric: one trunk, one head a task, the mean of the losses."""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import mse_loss

import gradagree_opt as ga

TASKS = 6
INPUTS = 4
EXAMPLES = 16


class MultiTask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(TASKS))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [head(self.trunk(each)) for head, each in zip(self.heads, x, strict=True)]


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    slopes = torch.randn(TASKS, INPUTS, 1, generator=draws)
    fabric = Fabric(accelerator="cpu", devices=1)
    model = MultiTask()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    optimizer = ga.TaskOptimizer(optimizer, ga.GradientAgreement())
    history = []
    for _ in range(iterations):
        x = torch.randn(TASKS, EXAMPLES, INPUTS, generator=draws)
        y = torch.tanh(x @ slopes)
        losses = torch.stack([mse_loss(p, each) for p, each in zip(model(x), y, strict=True)])
        optimizer.zero_grad()
        optimizer.step(losses)
        history.append(losses.mean().item())
    return history


if __name__ == "__main__":
    print(*main(), sep="\n")
