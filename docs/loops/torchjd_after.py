"""Multi-task regression with TorchJD: the Jacobian of one trunk aggregated, one head a task."""

import torch
from gradagree_opt.adapters.torchjd import GradientAgreement
from torch import nn
from torch.nn.functional import mse_loss
from torchjd.autojac import jac_to_grad, mtl_backward

TASKS = 6
INPUTS = 4
EXAMPLES = 16


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    slopes = torch.randn(TASKS, INPUTS, 1, generator=draws)
    trunk = nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(TASKS))
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=0.01)
    aggregator = GradientAgreement()
    history = []
    for _ in range(iterations):
        x = torch.randn(EXAMPLES, INPUTS, generator=draws)
        features = trunk(x)
        losses = [
            mse_loss(head(features), torch.tanh(x @ slope))
            for head, slope in zip(heads, slopes, strict=True)
        ]
        optimizer.zero_grad()
        mtl_backward(losses, features=features)
        jac_to_grad(trunk.parameters(), aggregator)
        optimizer.step()
        history.append(sum(loss.item() for loss in losses) / TASKS)
    return history


if __name__ == "__main__":
    print(*main(), sep="\n")
