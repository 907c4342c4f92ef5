"""LoRA on several tasks: a frozen base, low-rank factors that all tasks share, their mean loss."""

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import gradagree_opt as ga

TASKS = 4
INPUTS = 4
EXAMPLES = 16


class LoRA(nn.Module):
    """A frozen layer, plus the product of two factors that are trained."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    slopes = torch.randn(INPUTS, 1, generator=draws)
    slopes = slopes + 0.3 * torch.randn(TASKS, INPUTS, 1, generator=draws)
    model = nn.Sequential(LoRA(nn.Linear(INPUTS, 32), 4), nn.Tanh(), LoRA(nn.Linear(32, 1), 4))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = [0.0] * iterations
    for iteration in range(iterations):
        total = ga.TaskBatch(model, ga.GradientAgreement())
        for task in range(TASKS):
            x = torch.randn(EXAMPLES, INPUTS, generator=draws)
            loss = mse_loss(model(x), torch.tanh(x @ slopes[task]))
            total.add(loss)
            losses[iteration] += loss.item() / TASKS
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return losses


if __name__ == "__main__":
    print(*main(), sep="\n")
