"""What a lecturer would show: tasks that disagree, three aggregators, a loop, and a small ablation.

Run it from a clone or anywhere else: `python docs/tour.py`. It takes less than a minute, and needs
`pip install 'gradagree-opt[ablation]'` for its last part.
"""

import tempfile

import torch
from torch import nn
from torch.func import functional_call

import gradagree_opt as ga
from gradagree_opt.ablation import ablate
from gradagree_opt.tasks import Sine

# %% Tasks
# A task is a sine of its own amplitude and phase. `sample` draws a batch of them: `x` and `y` have
# the task axis first, here `[5, 10, 1]`, for the support set that a learner adapts on and for the
# query set that it is judged by.
torch.set_printoptions(precision=2, sci_mode=False)
draws = torch.Generator().manual_seed(0)
sine = Sine(support_shots=10, query_shots=10)
batch = sine.sample(5, generator=draws)
print("support x:", list(batch["support"][0].shape))

# %% One gradient a task
# All tasks start from the same network. `task_gradients` returns the gradient of each of them, with
# the task axis in front of the shape of every parameter.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
params = dict(model.named_parameters())


def loss_fn(
    params: dict[str, torch.Tensor], data: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    x, y = data
    return nn.functional.mse_loss(functional_call(model, params, (x,)), y)


gradients, losses = ga.task_gradients(loss_fn, params, batch["support"])
print("losses:", losses.detach())

# %% Do the tasks agree?
# The cosines between the gradients tell: 1 is full agreement, -1 full conflict.
flat = torch.cat([each.flatten(1) for each in gradients.values()], dim=1).detach()
units = flat / flat.norm(dim=1, keepdim=True)
cosines = units @ units.T
print("cosines:\n", cosines)

# %% Three aggregators
# The mean weights all tasks alike. Gradient Agreement rewards those that agree with the sum. Equal
# Agreement looks for the step on which all tasks agree alike: its cosines are the closest together.
spreads = {}
for aggregator in (ga.Mean(), ga.GradientAgreement(), ga.EqualAgreement()):
    result = aggregator.aggregate(gradients)
    update = torch.cat([each.flatten() for each in result.update.values()]).detach()
    agreement = units @ update / update.norm()
    spreads[type(aggregator).__name__] = agreement.std(correction=0).item()
    print(f"{aggregator!r}: {result.weights}")
    print(f"    cosines with the tasks: {agreement}")

# %% The swap in a plain loop
# Reptile by hand: adapt to every task, collect the displacements, aggregate them. One word differs
# between the two runs.


def train(aggregator: ga.Aggregator, rate: float, iterations: int = 200) -> float:
    """Mean error on 100 unseen tasks, after five gradient steps on each."""
    draws = torch.Generator().manual_seed(1)
    reptile = ga.Reptile(loss_fn, ga.InnerSGD(lr=0.02, steps=5))
    current = {name: p.detach().clone() for name, p in params.items()}
    for _ in range(iterations):
        tasks = sine.sample(10, generator=draws)
        update = reptile.step(current, {"support": tasks["support"]}, aggregator).update
        current = {name: p - rate * update[name] for name, p in current.items()}
    unseen = sine.sample(100, split="test", generator=draws)
    errors = []
    for index in range(100):
        support, query = (tuple(t[index] for t in unseen[part]) for part in ("support", "query"))
        errors.append(loss_fn(reptile.adapt(current, support), query))
    return torch.stack(errors).mean().item()


untrained = train(ga.Mean(), rate=0.5, iterations=0)
trained = {
    "mean": train(ga.Mean(), rate=0.5),
    "equal agreement": train(ga.EqualAgreement(), rate=0.5),
}
print(f"before training {untrained:.2f}, after {trained}")

# %% A small ablation
# One rate and one seed prove nothing. A study tunes the rate of each method on held-out tasks and
# repeats the training from several seeds. This one is far too short to conclude from; take
# `gradagree ablate equal-sine` for one that is not.
study = {
    "extends": "sine",
    "name": "tour",
    "title": "A study that is far too short",
    "outer": {"rates": [0.25, 0.5, 1.0]},
    "compile": False,
    "tuning": {"tasks": 20},
    "test": {"tasks": 50},
    "baseline": "mean",
    "methods": [
        {"name": "mean", "aggregator": "mean"},
        {"name": "gradient agreement", "aggregator": "gradient_agreement"},
        {"name": "equal agreement", "aggregator": "equal_agreement"},
    ],
}
with tempfile.TemporaryDirectory() as folder:
    table = ablate(study, out=folder, jobs=1, seeds=[0, 1, 2], iterations=100).table
print(table[["method", "rate", "mean_5_steps", "half_width_5_steps"]].to_string())
