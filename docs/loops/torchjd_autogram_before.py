"""Multi-task regression with TorchJD's autogram: the losses go backward with weights."""

import torch
from torch import nn
from torchjd.aggregation import MeanWeighting
from torchjd.autogram import Engine

TASKS = 6
INPUTS = 4
EXAMPLES = 16


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    slopes = torch.randn(TASKS, INPUTS, 1, generator=draws)
    model = nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh(), nn.Linear(32, TASKS))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine = Engine(model, batch_dim=None)
    weighting = MeanWeighting()
    history = []
    for _ in range(iterations):
        x = torch.randn(EXAMPLES, INPUTS, generator=draws)
        y = torch.tanh(x @ slopes).squeeze(-1).T
        losses = ((model(x) - y) ** 2).mean(0)
        optimizer.zero_grad()
        losses.backward(weighting(engine.compute_gramian(losses)))
        optimizer.step()
        history.append(losses.mean().item())
    return history


if __name__ == "__main__":
    print(*main(), sep="\n")
