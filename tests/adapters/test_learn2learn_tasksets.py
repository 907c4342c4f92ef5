"""learn2learn's tasksets as a task distribution."""

import random

import pytest
import torch
from gradagree_opt.adapters import plain
from torch.utils.data import Dataset, TensorDataset

import gradagree_opt as ga

l2l = pytest.importorskip("learn2learn", reason="learn2learn is not installed")

from gradagree_opt.adapters.learn2learn import Tasksets  # noqa: E402
from learn2learn.data.transforms import (  # noqa: E402
    ConsecutiveLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RemapLabels,
)

CLASSES, EXAMPLES = 8, 12


def dataset():
    """Example e of class c is the number 100 c + e."""
    x = (100 * torch.arange(CLASSES).unsqueeze(1) + torch.arange(EXAMPLES)).flatten()
    y = torch.arange(CLASSES).repeat_interleave(EXAMPLES)
    return l2l.data.MetaDataset(TensorDataset(x.unsqueeze(1).float(), y))


def taskset(ways=3, examples=4, num_tasks=-1, data=None):
    data = data or dataset()
    transforms = [
        NWays(data, ways),
        KShots(data, examples),
        LoadData(data),
        RemapLabels(data),
        ConsecutiveLabels(data),
    ]
    return l2l.data.Taskset(data, transforms, num_tasks=num_tasks)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def values(tasks):
    return {part: x.squeeze(-1) for part, (x, _) in tasks.items()}


def test_tasks_are_stacked_with_even_positions_for_support():
    tasks = Tasksets(taskset()).sample(5, generator=seeded())
    for x, y in tasks.values():
        assert x.shape == (5, 6, 1)
        assert y.sort().values.tolist() == [[0, 0, 1, 1, 2, 2]] * 5
    for support, query in zip(*values(tasks).values(), strict=True):
        assert len({*support.tolist(), *query.tolist()}) == 12
        classes = [part.div(100, rounding_mode="floor").tolist() for part in (support, query)]
        assert classes[0] == classes[1]
        assert len({*classes[0]}) == 3


def test_shots_of_every_class_are_support_and_the_rest_query():
    tasks = Tasksets(taskset(examples=6), shots=2).sample(3, generator=seeded())
    (support_x, support), (query_x, query) = tasks["support"], tasks["query"]
    assert support.shape == (3, 6)
    assert query.shape == (3, 12)
    for row in range(3):
        assert torch.bincount(support[row]).tolist() == [2, 2, 2]
        assert torch.bincount(query[row]).tolist() == [4, 4, 4]
        seen = {*support_x[row].flatten().tolist(), *query_x[row].flatten().tolist()}
        assert len(seen) == 18


@pytest.mark.parametrize("num_tasks", [-1, 20])
def test_the_generator_alone_decides(num_tasks):
    first = Tasksets(taskset(num_tasks=num_tasks)).sample(6, generator=seeded(1))
    random.seed(5)
    torch.manual_seed(5)
    other = Tasksets(taskset(num_tasks=num_tasks))
    other.sample(9, generator=seeded(2))  # what was drawn before changes nothing
    torch.testing.assert_close(other.sample(6, generator=seeded(1)), first, rtol=0, atol=0)
    different = other.sample(6, generator=seeded(3))
    assert not torch.equal(values(different)["support"], values(first)["support"])


@pytest.mark.parametrize("num_tasks", [-1, 1, 20])
def test_the_generator_decides_on_random_augmentations_too(num_tasks):
    class Noisy(Dataset):
        def __len__(self):
            return CLASSES * EXAMPLES

        def __getitem__(self, index):
            return torch.rand(1) + random.random(), index // EXAMPLES

    tasks = Tasksets(taskset(data=l2l.data.MetaDataset(Noisy()), num_tasks=num_tasks))
    drawn = [tasks.sample(2, generator=seeded(seed)) for seed in (0, 0, 1)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    if num_tasks != 1:
        assert not torch.equal(values(drawn[0])["query"], values(drawn[2])["query"])


def test_no_generator_of_another_device_is_seeded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeded"))
    Tasksets(taskset()).sample(2, generator=seeded(0))


def test_global_generators_are_left_as_they_were():
    states = random.getstate(), torch.get_rng_state()
    Tasksets(taskset()).sample(3, generator=seeded())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_taskset_of_few_tasks_has_no_others():
    tasks = values(Tasksets(taskset(num_tasks=3)).sample(40, generator=seeded()))["support"]
    assert len(tasks.unique(dim=0)) == 3


def test_every_split_has_its_taskset():
    parts = [l2l.data.FilteredMetaDataset(dataset(), labels) for labels in ([0, 1, 2], [3, 4, 5])]
    tasks = Tasksets(*(taskset(data=part) for part in parts))
    for split, low in (("train", 0), ("validation", 300)):
        drawn = values(tasks.sample(4, split=split, generator=seeded()))["query"]
        assert ((low <= drawn) & (drawn < low + 300)).all()
    with pytest.raises(ValueError, match=r"splits \['train', 'validation'\], found 'test'"):
        tasks.sample(1, split="test", generator=seeded())


def test_the_plain_loop_trains_on_a_taskset():
    data = dataset()
    fused = [FusedNWaysKShots(data, n=3, k=8), LoadData(data), RemapLabels(data)]
    tasks, generator = Tasksets(l2l.data.Taskset(data, fused)), seeded()
    weights = {"w": torch.zeros(2, 3, requires_grad=True)}

    def loss_fn(params, batch):
        x, y = batch
        features = torch.cat([x / 700, torch.ones_like(x)], -1)
        return torch.nn.functional.cross_entropy(features @ params["w"], y)

    losses = []
    plain.train(
        ga.MAML(loss_fn, ga.InnerSGD(lr=1.0, steps=5)),
        weights,
        lambda iteration: tasks.sample(4, generator=generator),
        torch.optim.SGD(weights.values(), lr=0.5),
        ga.GradientAgreement(),
        iterations=3,
        callback=lambda iteration, step: losses.append(step.losses.mean()),
    )
    assert all(loss < torch.tensor(3.0).log() for loss in losses)
    assert weights["w"].abs().sum() > 0


def test_what_is_no_taskset(without_type_checks):
    with pytest.raises(TypeError, match=r"learn2learn\.data\.Taskset for test, found list"):
        Tasksets(taskset(), taskset(), [1, 2])


@pytest.mark.parametrize(("shots", "found"), [(0, "found 0"), (-1, "found -1")])
def test_shots_below_one(shots, found):
    with pytest.raises(ValueError, match=f"expected shots to be at least 1, {found}"):
        Tasksets(taskset(), shots=shots)


def test_classes_with_no_example_left_for_the_query():
    with pytest.raises(ValueError, match="more than 4 examples of every class, found 4"):
        Tasksets(taskset(examples=4), shots=4).sample(1, generator=seeded())


def test_tasks_of_different_shapes():
    grown = taskset()
    sizes = iter([1, 2])
    collate = torch.utils.data.default_collate
    grown.task_collate = lambda rows: collate(rows[: 4 * next(sizes)])
    with pytest.raises(ValueError, match=r"tasks of one shape, found \[\[2, 1\], \[4, 1\]\]"):
        Tasksets(grown).sample(2, generator=seeded())
