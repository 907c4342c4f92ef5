"""task_gradients against backward() in a loop."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

import gradagree_opt as ga

from .models import models

TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-13}
MODELS = models(torch.float64)
each_model = pytest.mark.parametrize("name", MODELS)
MLP = MODELS["mlp"]


def assert_same_gradients(found, expected, tolerance):
    assert list(found) == list(expected)
    for name, stack in expected.items():
        assert (found[name].shape, found[name].dtype) == (stack.shape, stack.dtype)
        apart = torch.linalg.vector_norm(found[name] - stack)
        assert apart <= tolerance * torch.linalg.vector_norm(stack), name


@each_model
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 10])
def test_equals_backward_in_a_loop(name, dtype, chunk_size):
    model = models(dtype)[name]
    gradients, losses = ga.task_gradients(
        model.loss_fn, model.params, model.tasks, chunk_size=chunk_size
    )
    expected, expected_losses = model.loop()
    assert_same_gradients(gradients, expected, TOLERANCES[dtype])
    torch.testing.assert_close(losses, expected_losses, rtol=TOLERANCES[dtype], atol=0)


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False)])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_gradients_and_losses_are_differentiable(layer, chunk_size):
    module = nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), nn.Linear(4, 2)).double()
    draws = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(p.shape, generator=draws, dtype=p.dtype).requires_grad_()
        for name, p in module.named_parameters()
    }
    tasks = torch.randn(5, 6, 3, generator=draws, dtype=torch.float64)

    def loss_fn(params, x):
        return functional_call(module, params, (x,)).square().mean()

    found, losses = ga.task_gradients(loss_fn, params, tasks, chunk_size=chunk_size)
    total = sum(gradient.square().sum() for gradient in found.values()) + losses.sin().sum()
    alone = [loss_fn(params, x) for x in tasks]
    expected = sum(loss.sin() for loss in alone)
    for loss in alone:
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        expected = expected + sum(gradient.square().sum() for gradient in gradients)
    leaves = list(params.values())
    for a, b in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_parameters_that_a_task_does_not_use_have_zero_gradients():
    scaled, heads = MODELS["scaled"], MODELS["a head per task"]
    gradients, _ = ga.task_gradients(scaled.loss_fn, scaled.params, scaled.tasks)
    assert torch.equal(gradients["unused"], torch.zeros(5, 4, dtype=torch.float64))
    assert gradients["scale"].shape == (5,)
    gradients, _ = ga.task_gradients(heads.loss_fn, heads.params, heads.tasks)
    used = gradients["heads"].ne(0).any(-1)
    assert used.nonzero().tolist() == [[0, 0], [1, 1], [2, 1], [3, 2], [4, 0]]


def test_gradients_have_the_structure_of_the_parameters():
    weight, bias = MLP.params["0.weight"], MLP.params["0.bias"]
    second = {"weight": MLP.params["2.weight"], "bias": MLP.params["2.bias"]}

    def loss_fn(params, batch):
        (weight, bias), second = params
        hidden = torch.tanh(batch[0] @ weight.T + bias)
        return ((hidden @ second["weight"].T + second["bias"] - batch[1]) ** 2).mean()

    gradients, _ = ga.task_gradients(loss_fn, ((weight, bias), second), MLP.tasks)
    expected, _ = MLP.loop()
    assert isinstance(gradients, tuple) and isinstance(gradients[0], tuple)
    found = dict(zip(expected, [*gradients[0], *gradients[1].values()], strict=True))
    assert_same_gradients(found, expected, 1e-13)


def test_parameters_of_several_dtypes_keep_theirs():
    params = {"wide": torch.ones(2, dtype=torch.float64), "narrow": torch.ones(2)}
    tasks = torch.arange(6.0).reshape(3, 2)
    gradients, losses = ga.task_gradients(
        lambda p, x: (p["wide"] * p["narrow"] * x).sum(), params, tasks
    )
    assert gradients["wide"].dtype == losses.dtype == torch.float64
    assert gradients["narrow"].dtype == torch.float32
    assert torch.equal(gradients["wide"], tasks.double())
    assert torch.equal(gradients["narrow"], tasks)


@pytest.mark.parametrize(("chunk_size", "calls"), [(None, 1), (10, 1), (3, 2), (2, 3), (1, 5)])
def test_the_loss_is_called_once_a_chunk(chunk_size, calls):
    seen = []

    def loss_fn(params, batch):
        seen.append(batch)
        return MLP.loss_fn(params, batch)

    ga.task_gradients(loss_fn, MLP.params, MLP.tasks, chunk_size=chunk_size)
    assert len(seen) == calls


def test_parameters_and_their_grad_are_left_alone():
    params = dict(MLP.module.named_parameters())
    MLP.module.zero_grad()
    before = tree_map(torch.clone, MLP.params)
    ga.task_gradients(MLP.loss_fn, params, MLP.tasks)
    assert all(p.grad is None for p in params.values())
    assert all(torch.equal(before[name], p) for name, p in params.items())


def refused(error, message, *, loss_fn=MLP.loss_fn, params=MLP.params, tasks=MLP.tasks, **options):
    with pytest.raises(error, match=message) as caught:
        ga.task_gradients(loss_fn, params, tasks, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_loss_with_axes_is_refused(chunk_size):
    def loss_fn(params, batch):
        return batch[0].sum(1) * params["0.weight"].sum()

    message = r"to return a scalar tensor, found a tensor of shape \[6\]; reduce it"
    refused(ValueError, message, loss_fn=loss_fn, chunk_size=chunk_size)


def test_a_loss_that_is_no_tensor_is_refused(without_type_checks):
    def shots(params, batch):
        return len(batch[0])

    refused(ValueError, "to return a scalar tensor, found int", loss_fn=shots)


def test_an_empty_batch_is_refused():
    empty = tree_map(lambda leaf: leaf[:0], MLP.tasks)
    refused(ValueError, "tasks of at least one task, found an empty task axis", tasks=empty)
    refused(ValueError, "tasks with at least one tensor, found an empty pytree", tasks=())


def test_unequal_task_axes_are_refused():
    x, y = MLP.tasks
    message = refused(ValueError, "found 5 in '0' and 4 in '1'", tasks=(x, y[:4]))
    assert "gradient" not in message, "the advice is for stacks of gradients"


def test_a_batch_without_a_task_axis_is_refused():
    tasks = {"x": MLP.tasks[0], "rate": torch.tensor(0.1)}
    refused(ValueError, "the task axis first, found a tensor without axes in 'rate'", tasks=tasks)


def test_a_batch_of_something_else_than_tensors_is_refused():
    refused(
        TypeError,
        "every leaf of the tasks to be a tensor, found int in '1'",
        tasks=(MLP.tasks[0], 3),
    )


@pytest.mark.parametrize(
    ("leaf", "found"), [(torch.arange(3), "torch.int64"), (1.0, "float"), (None, "NoneType")]
)
def test_parameters_that_have_no_gradient_are_refused(leaf, found):
    message = f"expected floating-point parameters, found {found} in 'steps'"
    refused(TypeError, message, params=MLP.params | {"steps": leaf})


def test_no_parameters_are_refused():
    refused(ValueError, "parameters with at least one .* found an empty pytree", params={})


@pytest.mark.parametrize("chunk_size", [0, -2])
def test_chunks_of_no_task_are_refused(chunk_size):
    message = f"expected chunk_size to be an integer of 1 or more, found {chunk_size}"
    refused(ValueError, message, chunk_size=chunk_size)
