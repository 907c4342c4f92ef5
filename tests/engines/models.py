"""Models with tasks of their own, and per-task gradients by ``loss.backward()`` in a loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._pytree import tree_map

Batch = tuple[Tensor, Tensor]


class Scaled(nn.Module):
    """A linear map times a 0-d parameter, beside one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


class TiedLanguageModel(nn.Module):
    """The output layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(tokens))))


class HeadPerTask(nn.Module):
    """Each example names its head: a task has no gradient in the heads of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.heads = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.encoder(x[..., :3]))
        return (hidden * self.heads[x[..., 3].long()]).sum(-1, keepdim=True)


class Attention(nn.Module):
    """Self-attention over the examples of a batch, by a kernel that may be differentiated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.output = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.unsqueeze(0)
        with sdpa_kernel(SDPBackend.MATH):
            attended, _ = self.attention(sequence, sequence, sequence, need_weights=False)
        return self.output(attended.squeeze(0))


class Model(NamedTuple):
    """A module, its loss, and the batches of five tasks."""

    module: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    tasks: Batch

    def loss_fn(self, params: Any, batch: Batch) -> Tensor:
        return self.criterion(functional_call(self.module, params, (batch[0],)), batch[1])

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def loop(self) -> tuple[dict[str, Tensor], Tensor]:
        """Stacked gradients and losses by ``backward()``; zeros where a parameter is not used."""
        gradients: dict[str, list[Tensor]] = {name: [] for name in self.params}
        losses = []
        for index in range(len(self.tasks[0])):
            x, y = tree_map(lambda leaf, i=index: leaf[i], self.tasks)
            self.module.zero_grad()
            loss = self.criterion(self.module(x), y)
            loss.backward()
            losses.append(loss.detach())
            for name, p in self.module.named_parameters():
                gradients[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
        stacked = {name: torch.stack(each) for name, each in gradients.items()}
        return stacked, torch.stack(losses)


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def models(dtype: torch.dtype) -> dict[str, Model]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "mlp": (network(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), mse_loss),
            "scaled": (Scaled(), mse_loss),
            "convolutions": (
                network(
                    nn.Conv2d(1, 3, 3, padding=1),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                    nn.BatchNorm2d(3, track_running_stats=False),
                    nn.Conv2d(3, 2, 3),
                    nn.Flatten(),
                    nn.Linear(8, 3),
                ),
                cross_entropy,
            ),
            "buffers": (
                network(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Tanh(), nn.Linear(4, 2)),
                mse_loss,
            ),
            "attention": (Attention(), mse_loss),
            "embedding": (
                network(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 3)),
                cross_entropy,
            ),
            "tied weights": (TiedLanguageModel(), token_loss),
            "a head per task": (HeadPerTask(), mse_loss),
        }
        heads = torch.tensor([0.0, 1.0, 1.0, 2.0, 0.0]).reshape(5, 1, 1).expand(5, 6, 1)
        tasks = {
            "mlp": (torch.randn(5, 6, 3), torch.randn(5, 6, 2)),
            "scaled": (torch.randn(5, 6, 3), torch.randn(5, 6, 2)),
            "convolutions": (torch.randn(5, 6, 1, 8, 8), torch.randint(3, (5, 6))),
            "buffers": (torch.randn(5, 6, 3), torch.randn(5, 6, 2)),
            "attention": (torch.randn(5, 6, 4), torch.randn(5, 6, 2)),
            "embedding": (torch.randint(7, (5, 6, 2)), torch.randint(3, (5, 6))),
            "tied weights": (torch.randint(7, (5, 6)), torch.randint(7, (5, 6))),
            "a head per task": (
                torch.cat([torch.randn(5, 6, 3), heads], -1),
                torch.randn(5, 6, 1),
            ),
        }

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return {
        name: Model(module.to(dtype), criterion, tree_map(cast, tasks[name]))
        for name, (module, criterion) in made.items()
    }


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, -2), tokens.flatten())
