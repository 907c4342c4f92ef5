"""Multi-task regression: one trunk, one head a task, the mean of the task losses backward."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

TASKS = 6
INPUTS = 4
EXAMPLES = 16


class MultiTask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(TASKS))


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    slopes = torch.randn(TASKS, INPUTS, 1, generator=draws)
    model = MultiTask()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(iterations):
        x = torch.randn(TASKS, EXAMPLES, INPUTS, generator=draws)
        y = torch.tanh(x @ slopes)
        losses = torch.stack(
            [mse_loss(model.heads[i](model.trunk(x[i])), y[i]) for i in range(TASKS)]
        )
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        history.append(losses.mean().item())
    return history


if __name__ == "__main__":
    print(*main(), sep="\n")
