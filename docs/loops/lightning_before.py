"""Multi-task regression in Lightning: a training batch is one task, four are accumulated a step."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

TASKS = 4
INPUTS = 4
EXAMPLES = 16


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(TASKS))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        head = self.heads[batch_idx % TASKS]
        loss = mse_loss(head(self.trunk(x)), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def tasks(iterations: int) -> TensorDataset:
    """The tasks in turn: x ``[EXAMPLES, INPUTS]`` and y ``[EXAMPLES, 1]``."""
    draws = torch.Generator().manual_seed(0)
    slopes = torch.randn(TASKS, INPUTS, 1, generator=draws)
    x = torch.randn(iterations * TASKS, EXAMPLES, INPUTS, generator=draws)
    return TensorDataset(x, torch.tanh(x @ slopes.repeat(iterations, 1, 1)))


def main(iterations: int = 200) -> list[float]:
    torch.manual_seed(0)
    model = Regression()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=iterations,
        accumulate_grad_batches=TASKS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(tasks(iterations), batch_size=None))
    return torch.tensor(model.losses).reshape(iterations, TASKS).mean(1).tolist()


if __name__ == "__main__":
    print(*main(), sep="\n")
