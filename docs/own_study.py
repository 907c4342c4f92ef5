"""Tasks and a network of one's own, for the study own_study.yaml."""

import torch
from torch import Tensor, nn

from gradagree_opt.tasks.protocol import Batch, Split

RATES = {"train": (0.2, 1.0), "validation": (1.0, 1.2), "test": (1.2, 1.5)}


class Decays:
    """Regression: y = a exp(-r x) at x from U[0, 5], a from U[1, 3], r by the split."""

    def __init__(self, support_shots: int, query_shots: int, noise: float = 0.0) -> None:
        self.shots = {"support": support_shots, "query": query_shots}
        self.noise = noise

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(n_tasks, *shape, 1, generator=generator)

        height, rate = uniform(1, 3, 1), uniform(*RATES[split], 1)

        def examples(shots: int) -> Batch:
            x = uniform(0, 5, shots)
            noise = self.noise * torch.randn(x.shape, generator=generator)
            return x, height * torch.exp(-rate * x) + noise

        return {part: examples(shots) for part, shots in self.shots.items()}


class Residual(nn.Module):
    """A line, and what a hidden layer adds to it."""

    def __init__(self, inputs: int, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.line = nn.Linear(inputs, outputs)
        self.hidden = nn.Linear(inputs, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) + self.head(torch.tanh(self.hidden(x)))
