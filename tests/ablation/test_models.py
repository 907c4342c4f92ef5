"""The networks: their sizes, and initial parameters that come from the seed alone."""

import pytest
import torch
from torch import nn

from gradagree_opt.ablation.loading import load
from gradagree_opt.ablation.models import (
    accuracy,
    batch_loss,
    build_module,
    initial_params,
    predict,
)
from gradagree_opt.ablation.study import GroupedTasks, Study


def size(module: nn.Module) -> int:
    return sum(leaf.numel() for leaf in module.parameters())


def test_the_papers_network_has_64_64_hidden_units() -> None:
    module = build_module(load("sine"))
    assert size(module) == (1 + 1) * 64 + (64 + 1) * 64 + 64 + 1
    assert module(torch.zeros(7, 1)).shape == (7, 1)


def test_conv4_has_the_size_and_the_output_of_finns_network() -> None:
    module = build_module(load("omniglot-5way-1shot"))
    first, others, norms = 32 * (9 + 1), 3 * 32 * (9 * 32 + 1), 4 * 2 * 32
    assert size(module) == first + others + norms + (32 * 4 + 1) * 5
    assert module(torch.zeros(3, 1, 28, 28)).shape == (3, 5)
    assert not list(module.buffers())  # BatchNorm without running statistics


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


def test_mini_imagenet_has_finns_network_with_pooling() -> None:
    module = build_module(load("mini-imagenet-5way-1shot"))
    convolutions = [3 * 32 * 9 + 32, *[32 * 32 * 9 + 32] * 3]
    assert size(module) == sum(convolutions) + 4 * 2 * 32 + (5 * 5 * 32 + 1) * 5
    assert module(torch.rand(4, 3, 84, 84)).shape == (4, 5)
