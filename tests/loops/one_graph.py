"""Losses of one graph, which goes through a shared trunk, and the step that they should give."""

import torch
from torch import nn

import gradagree_opt as ga
from gradagree_testing import reference

N = 5


class Net(nn.Module):
    """A trunk, what is in the middle of it, and a head a task."""

    def __init__(self, n=N, middle=lambda x: x, dtype=torch.float64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inside, self.outside = nn.Linear(3, 6), nn.Linear(6, 6)
            self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(n))
        self.middle = middle
        self.to(dtype)

    def losses(self, scale=1.0):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
        shared = self.outside(self.middle(torch.tanh(self.inside(x.to(self.inside.weight)))))
        torch.tanh_(shared)
        return [
            scale * (head(shared) - 0.3 * task + (task % 2) * shared[:, :2].sum()).square().mean()
            for task, head in enumerate(self.heads)
        ]


def naive(module, scale=1.0):
    """The gradients, stacked and flat, one backward pass each."""
    params = [*module.parameters()]
    grads = [
        torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
        for loss in module.losses(scale)
    ]
    # Detached: in torch 2.5 the zeros that autograd puts in for None require a gradient.
    rows = [torch.cat([leaf.detach().flatten() for leaf in each]).double() for each in grads]
    return torch.stack(rows)


def flat_grad(module):
    each = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return torch.cat([grad.flatten() for grad in each]).double()


def backward(module, aggregator, scale=1.0):
    batch = ga.TaskBatch(module, aggregator)
    for loss in module.losses(scale):
        batch.add(loss)
    return batch.backward()


def assert_agrees(module, result, options, tolerance=1e-12, scale=1.0):
    """.grad, the update and the weights are those of the formulas, from the naive gradients."""
    stack = naive(module, scale)
    gram = reference.gram(stack.numpy())
    weights = torch.from_numpy(reference.agreement(gram, **options).astype(float))
    expected = weights @ stack
    torch.testing.assert_close(result.weights.double(), weights, rtol=tolerance, atol=tolerance)
    update = torch.cat([leaf.flatten() for leaf in result.update.values()]).double()
    for found in (update, flat_grad(module)):
        assert (found - expected).norm() <= tolerance * expected.norm()
