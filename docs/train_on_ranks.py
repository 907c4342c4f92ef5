"""Reptile on sine curves over any number of ranks, which goes on after it was killed.

    torchrun --nproc-per-node 2 docs/train_on_ranks.py FOLDER [STEPS]

Every rank draws the batch of a step from the step's own seed and takes its share of it, so that
another number of ranks trains on the same tasks. A checkpoint holds tensors only; reading one
unpickles its metadata, so read none that you do not trust.
"""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import gradagree_opt as ga
from gradagree_opt.tasks import Sine

TASKS = 10
EVERY = 20
"""Steps from one checkpoint to the next."""

model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return mse_loss(functional_call(model, params, (x,)), y)


def complete(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end: the metadata come last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def save(folder: Path, state: dict[str, Tensor], step: int) -> None:
    """One folder a checkpoint, of which two are kept."""
    dcp.save(state, checkpoint_id=folder / f"step-{step:06d}")
    if dist.get_rank() == 0:
        for old in complete(folder)[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def main(folder: Path, steps: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()  # the same on every rank
    # In float64 another number of ranks changes the last digits alone.
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    velocity = {f"velocity.{name}": torch.zeros_like(p) for name, p in params.items()}
    step, rate = torch.zeros((), dtype=torch.int64), 0.1
    state = {**params, **velocity, "step": step}
    if found := complete(folder):
        dcp.load(state, checkpoint_id=found[-1])  # in place
    sine = Sine(support_shots=10, query_shots=1, dtype=torch.float64)
    reptile = ga.Reptile(loss_fn, ga.InnerSGD(lr=0.02, steps=5))
    aggregator = ga.distributed(ga.EqualAgreement())
    for index in range(int(step), steps):
        tasks = sine.sample(TASKS, generator=torch.Generator().manual_seed(index))
        share = ga.own_share({"support": tasks["support"]})
        result = reptile.step(params, share, aggregator)
        for name, p in params.items():
            velocity[f"velocity.{name}"].mul_(0.5).add_(result.update[name])
            p.sub_(rate * velocity[f"velocity.{name}"])
        step += 1
        if (index + 1) % EVERY == 0 or index + 1 == steps:
            save(folder, state, index + 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200)
