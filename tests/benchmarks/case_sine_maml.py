"""Second-order MAML on 25 sines of 10 + 10 points, agreement on the meta-gradients."""

import torch
from torch.nn.functional import mse_loss

from gradagree_opt.ablation.training.networks import mlp
from gradagree_opt.tasks import Sine

from . import maml, maml_in_jax
from .timing import Bar, Case

OURS = "gradagree, compiled"


def case() -> Case:
    torch.manual_seed(0)
    tasks = Sine(support_shots=10, query_shots=10).sample(
        25, split="train", generator=torch.Generator(torch.get_default_device()).manual_seed(0)
    )
    problem = maml.Problem(mlp([1, 40, 40, 1], torch.nn.ReLU), mse_loss, tasks, 0.01, "gradient")
    return Case(
        "sine-maml",
        "Sine MAML: second order, 25 tasks of 10 + 10 points, one inner step, MLP 1-40-40-1, "
        "agreement on the meta-gradients",
        [
            *maml.contestants(problem),
            maml_in_jax.contestant(problem, maml_in_jax.mlp, maml_in_jax.squared_error),
        ],
        [
            Bar(OURS, "learn2learn", 1 / 70),
            Bar(OURS, "jax.jit", 0.8),
        ],
        rounds=21,
    )
