"""Multi-task regression in Lightning on two devices: two tasks of each are accumulated a step."""

import sys

import lightning.pytorch as pl
import torch
from gradagree_opt.adapters.lightning import AgreementCallback
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gradagree_opt as ga

TASKS = 4
DEVICES = 2
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
        head = self.heads[(batch_idx * DEVICES + self.global_rank) % TASKS]
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
        devices=DEVICES,
        strategy="ddp_find_unused_parameters_true",
        accumulate_grad_batches=TASKS // DEVICES,
        callbacks=[AgreementCallback(ga.distributed(ga.GradientAgreement()))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's own sampler would shuffle the tasks.
    sampler = DistributedSampler(tasks(iterations), DEVICES, trainer.global_rank, shuffle=False)
    trainer.fit(model, DataLoader(tasks(iterations), batch_size=None, sampler=sampler))
    return torch.tensor(model.losses).reshape(iterations, TASKS // DEVICES).mean(1).tolist()


if __name__ == "__main__":
    losses = main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    if torch.distributed.get_rank() == 0:
        print(*losses, sep="\n")
