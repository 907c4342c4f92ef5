"""The networks, layer by layer, and initial parameters that come from the seed alone."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradagree_opt.ablation.kinds.grouped import GroupedTasks
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.sections import MLP
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import (
    accuracy,
    batch_loss,
    build_module,
    initial_params,
    predict,
)


def size(module: nn.Module) -> int:
    return sum(leaf.numel() for leaf in module.parameters())


def test_the_papers_network_has_64_64_hidden_units() -> None:
    module = build_module(load("sine"))
    assert size(module) == (1 + 1) * 64 + (64 + 1) * 64 + 64 + 1
    assert module(torch.zeros(7, 1)).shape == (7, 1)


def with_model(name: str, **changes: object) -> Study:
    study = load(name)
    return study.model_copy(update={"model": study.model.model_copy(update=changes)})


def randomised(study: Study) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The network with all its parameters drawn anew, and what gives them in their order."""
    module = build_module(study).double()
    generator = torch.Generator().manual_seed(0)
    for leaf in module.parameters():
        leaf.data = 0.3 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    leaves = iter(list(module.parameters()))
    return module, lambda: next(leaves).detach()


def normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """BatchNorm by the batch at hand, from its definition."""
    batch = x.transpose(0, 1).flatten(1)
    shape = (-1, *[1] * (x.dim() - 2))
    mean, variance = batch.mean(1).view(shape), batch.var(1, correction=0).view(shape)
    return (x - mean) / (variance + 1e-5).sqrt() * scale.view(shape) + shift.view(shape)


def padded(x: Tensor, window: int, stride: int, value: float) -> Tensor:
    """As TensorFlow's padding "SAME" does: what is odd of it stands after the last place."""
    side = x.shape[-1]
    total = max((-(-side // stride) - 1) * stride + window - side, 0)
    before = total // 2
    return functional.pad(x, (before, total - before) * 2, value=value)


@pytest.mark.parametrize(("network", "places"), [("nichol", 4), ("finn", 1), (None, 4)])
def test_a_network_for_drawings_is_the_one_in_its_authors_code(
    network: str | None, places: int
) -> None:
    study = with_model("omniglot-5way-1shot", filters=6, network=network)
    module, leaf = randomised(study)
    assert size(module) == 6 * 10 + 3 * 6 * 55 + 4 * 2 * 6 + (6 * places + 1) * 5
    assert not list(module.buffers())  # BatchNorm without running statistics
    drawings = torch.rand(7, 1, 28, 28, dtype=torch.float64)
    x = drawings.rot90(2, (2, 3))  # half a turn, of drawings, kernels and what comes out
    for _ in range(4):
        kernel, bias = leaf().rot90(2, (2, 3)), leaf()
        x = functional.conv2d(padded(x, 3, 2, 0.0), kernel, bias, stride=2)
        x = normalised(x, leaf(), leaf()).relu()
    assert x.shape == (7, 6, 2, 2)
    x = x.mean((2, 3)) if network == "finn" else x.rot90(2, (2, 3)).flatten(1)
    torch.testing.assert_close(module(drawings), functional.linear(x, leaf(), leaf()))


@pytest.mark.parametrize(("network", "side"), [("nichol", 6), ("finn", 5), (None, 5)])
def test_a_network_for_photographs_is_the_one_in_its_authors_code(
    network: str | None, side: int
) -> None:
    study = with_model("mini-imagenet-5way-1shot", filters=6, network=network)
    module, leaf = randomised(study)
    assert size(module) == 6 * 28 + 3 * 6 * 55 + 4 * 2 * 6 + (6 * side**2 + 1) * 5
    assert not list(module.buffers())
    photographs = torch.rand(4, 3, 84, 84, dtype=torch.float64)
    x = photographs
    for _ in range(4):
        x = functional.conv2d(padded(x, 3, 1, 0.0), leaf(), leaf())
        x = normalised(x, leaf(), leaf())
        if network == "nichol":
            x = functional.max_pool2d(padded(x, 2, 2, -torch.inf), 2).relu()
        else:
            x = functional.max_pool2d(x.relu(), 2)
    assert x.shape == (4, 6, side, side)
    torch.testing.assert_close(module(photographs), functional.linear(x.flatten(1), leaf(), leaf()))


def test_finns_network_without_convolutions_normalises_before_every_activation() -> None:
    model = MLP(kind="mlp", hidden=[256, 128, 64, 64], batch_norm=True)
    study = load("omniglot-5way-1shot").model_copy(update={"model": model})
    module, leaf = randomised(study)
    sizes = [784, 256, 128, 64, 64]
    hidden = sum((before + 1 + 2) * after for before, after in pairwise(sizes))
    assert size(module) == hidden + 65 * 5
    assert not list(module.buffers())
    drawings = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    x = drawings.flatten(1)
    for _ in sizes[1:]:
        x = normalised(functional.linear(x, leaf(), leaf()), leaf(), leaf()).relu()
    torch.testing.assert_close(module(drawings), functional.linear(x, leaf(), leaf()))


def test_accuracy_is_the_share_of_right_classes_and_none_of_an_overflow() -> None:
    outputs = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [0.5, 0.0]])
    y = torch.tensor([0, 1, 1, 0])
    assert accuracy(outputs, y) == 0.75
    for bad in (torch.nan, torch.inf):
        outputs[2, 1] = bad
        assert accuracy(outputs, y).isnan()


def test_the_hidden_activation_is_the_one_asked_for(study: Study) -> None:
    kinds = [type(layer) for layer in build_module(study).children()]
    assert kinds == [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear]


def test_initial_parameters_come_from_the_seed_and_leave_the_global_generator(
    study: Study,
) -> None:
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first = initial_params(study, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(12)
    again, other = initial_params(study, 0), initial_params(study, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("seed", [0, 1])
def test_predict_is_the_module_at_other_parameters(study: Study, seed: int) -> None:
    module, params, x = build_module(study), initial_params(study, seed), torch.randn(4, 1)
    expected = predict(module, params, x)
    module.load_state_dict(params)
    assert torch.equal(module(x), expected)


def test_a_study_of_groups_predicts_one_number_from_their_inputs(study: Study) -> None:
    tasks = GroupedTasks(kind="grouped", dataset="Oxboys", support_shots=4)
    grouped = study.model_copy(update={"tasks": tasks})
    module = build_module(grouped)
    x, y = torch.randn(5, 1), torch.randn(5, 1)
    assert module(x).shape == y.shape
    params = initial_params(grouped, 0)
    expected = (predict(module, params, x) - y).square().mean()
    torch.testing.assert_close(batch_loss(grouped, module)(params, (x, y)), expected)
