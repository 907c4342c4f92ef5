"""Buffers of other kinds than plain dense ones: a step runs, and they are left as found."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

import gradagree_opt as ga

# torch's own words on sparse tensors: that it does not check them, and that vmap goes one by one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

X = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
AGREE = ga.GradientAgreement()


def made_for_inference():
    with torch.inference_mode():
        return torch.eye(4) + 1


def first_rows():
    return (torch.eye(4) + torch.eye(4).roll(1, 0)).to_sparse()


BUFFERS = {
    "sparse": first_rows,
    "not coalesced": lambda: torch.sparse_coo_tensor(
        [[0, 0, 3], [1, 1, 2]], [1.0, 2.0, 3.0], (4, 4)
    ),
    "expanded": lambda: torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(4, 4),
    "made for inference": made_for_inference,
    "none": lambda: None,
    "empty": lambda: torch.zeros(0, 4),
}


class Graph(nn.Module):
    """A layer whose examples are mixed by a buffer."""

    def __init__(self, buffer):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2)
        self.register_buffer("mix", buffer)

    def forward(self, x):
        y = self.linear(x)
        if self.mix is not None and self.mix.is_inference():
            y = y + self.mix[:, :2]  # a product would need it for its derivative
        elif self.mix is not None and len(self.mix):
            y = torch.sparse.mm(self.mix, y) if self.mix.is_sparse else self.mix @ y
        return y.tanh()


def by_hand(module):
    """Row i is the gradient of task i, by a backward pass."""
    rows = []
    for x in X:
        grads = torch.autograd.grad(module(x).square().sum(), [*module.parameters()])
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    stack = torch.stack(rows)
    scores = stack @ stack.sum(0)
    return scores / scores.abs().sum() @ stack


@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("engine", ["auto", "streamed"])
def test_the_gradients_are_those_of_a_loop_and_the_buffer_is_the_same(kind, engine):
    module = Graph(BUFFERS[kind]())
    if module.mix is not None and module.mix.is_sparse and torch.__version__ < "2.6":
        pytest.skip("torch 2.5 has no sparse product of tasks")
    params = {name: p.detach() for name, p in module.named_parameters()}
    before = module.mix

    def loss_fn(params, x):
        return functional_call(module, params, (x,)).square().sum()

    result = ga.aggregate_gradients(loss_fn, params, X, AGREE, engine=engine)
    found = torch.cat([leaf.flatten() for leaf in result.update.values()])
    torch.testing.assert_close(found, by_hand(module))
    assert module.mix is before
    maml = partial(ga.MAML, loss_fn, ga.InnerSGD(0.1, 1), signal="gradient", first_order=True)
    step = maml(engine=engine).step(params, {"support": X, "query": X}, AGREE)
    looped = maml(engine="stacked", chunk_size=1).step(params, {"support": X, "query": X}, AGREE)
    torch.testing.assert_close(step.update, looped.update)
    assert module.mix is before


@pytest.mark.parametrize("kind", ["sparse", "not coalesced"])
def test_a_sparse_buffer_that_forward_changes_is_refused_and_put_back(kind):
    module = Graph(BUFFERS[kind]())
    before = module.mix.to_dense()
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss_fn(params, x):
        module.mix.mul_(2)
        return functional_call(module, params, (x,)).square().sum()

    with pytest.raises(ValueError, match="changes no buffer, found"):
        ga.Reptile(loss_fn, ga.InnerSGD(0.1, 1), chunk_size=1).step(params, {"support": X}, AGREE)
    assert torch.equal(module.mix.to_dense(), before)
