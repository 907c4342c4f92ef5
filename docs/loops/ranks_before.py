"""Reptile that goes on after it was killed, on sine curves or Omniglot: FOLDER [STEPS] [OMNIGLOT].

A step draws its batch from a seed of its own. A checkpoint holds tensors only; reading one
unpickles its metadata, so read none that you do not trust.
"""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

import gradagree_opt as ga
from gradagree_opt.tasks import Omniglot, Sine

TASKS = 10
EVERY = 20
"""Steps from one checkpoint to the next."""


def regression() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
    )


def classification(ways: int) -> nn.Module:
    layers = [nn.Conv2d(1 if not depth else 16, 16, 3, stride=2, padding=1) for depth in range(3)]
    blocks = [nn.Sequential(layer, nn.GroupNorm(4, 16), nn.ReLU()) for layer in layers]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(16 * 4 * 4, ways))


def complete(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end: the metadata come last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def save(folder: Path, state: dict[str, Tensor], step: int) -> None:
    """One folder a checkpoint, of which two are kept."""
    dcp.save(state, checkpoint_id=folder / f"step-{step:06d}")
    for old in complete(folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)  # another process may do so too


def main(folder: Path, steps: int, drawings: Path | None) -> None:
    torch.manual_seed(0)  # the same parameters in every process
    # In float64, sums in another order change the last digits alone.
    tasks: Sine | Omniglot
    if drawings is None:
        model, criterion = regression(), mse_loss
        tasks = Sine(support_shots=10, query_shots=1, dtype=torch.float64)
    else:
        model, criterion = classification(ways=5), cross_entropy
        tasks = Omniglot.from_npz(drawings, way=5, shot=5, dtype=torch.float64)

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return criterion(functional_call(model, params, (x,)), y)

    params = {name: p.detach().double() for name, p in model.named_parameters()}
    velocity = {f"velocity.{name}": torch.zeros_like(p) for name, p in params.items()}
    step, rate = torch.zeros((), dtype=torch.int64), 0.1
    state = {**params, **velocity, "step": step}
    if found := complete(folder):
        dcp.load(state, checkpoint_id=found[-1])  # in place
    reptile = ga.Reptile(loss_fn, ga.InnerSGD(lr=0.02, steps=5))
    aggregator = ga.EqualAgreement()
    for index in range(int(step), steps):
        batch = tasks.sample(TASKS, generator=torch.Generator().manual_seed(index))
        result = reptile.step(params, {"support": batch["support"]}, aggregator)
        for name, p in params.items():
            velocity[f"velocity.{name}"].mul_(0.5).add_(result.update[name])
            p.sub_(rate * velocity[f"velocity.{name}"])
        step += 1
        if (index + 1) % EVERY == 0 or index + 1 == steps:
            save(folder, state, index + 1)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]) if len(sys.argv) > 2 else 200,
        Path(sys.argv[3]) if len(sys.argv) > 3 else None,
    )
