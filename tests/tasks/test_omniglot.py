"""Episodes of Omniglot, on images that say which they are and on the real ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradagree_opt.tasks import Omniglot

SPLITS = torch.arange(30) % 3


def names(images):
    """Character and drawing of every image, read from its pixels."""
    return (images[..., 0, 0, :2] * 255).round().long().unbind(-1)


def assert_equal_counts(counts, total):
    """No count is five standard deviations away from an equal share."""
    share = total / counts.numel()
    assert (counts - share).abs().max() < 5 * math.sqrt(share)


@given(
    way=st.integers(1, 10),
    shots=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    split=st.sampled_from(["train", "validation", "test"]),
    seed=st.integers(0, 2**32),
)
def test_an_episode_is_what_the_protocol_says(named_images, seeded, way, shots, split, seed):
    omniglot = Omniglot(named_images, SPLITS, way=way, shot=shots[0], query_shots=shots[1])
    tasks = omniglot.sample(3, split=split, generator=seeded(seed))
    for task in range(3):
        seen, characters = set(), {}
        for part, shot in zip(("support", "query"), shots, strict=True):
            x, y = (tensor[task] for tensor in tasks[part])
            assert x.shape == (way * shot, 1, 28, 28)
            assert y.bincount().tolist() == [shot] * way
            for character, drawing, label in zip(*names(x), y, strict=True):
                seen.add((int(character), int(drawing)))
                characters.setdefault(int(label), set()).add(int(character))
        assert len(seen) == way * sum(shots), "a drawing came twice"
        assert [len(characters[label]) for label in range(way)] == [1] * way
        of_the_task = set.union(*characters.values())
        assert len(of_the_task) == way, "two labels share a character"
        assert {SPLITS[character].item() for character in of_the_task} == {
            ["train", "validation", "test"].index(split)
        }


def test_every_assignment_of_labels_to_characters_is_equally_likely(named_images, seeded):
    omniglot = Omniglot(named_images[:9], SPLITS[:9], way=3)
    x, y = omniglot.sample(6000, generator=seeded(0))["support"]
    characters = names(x)[0].gather(1, y.argsort(1)) // 3
    assignments = (characters * torch.tensor([9, 3, 1])).sum(1)
    _, counts = assignments.unique(return_counts=True)
    assert len(counts) == 6
    assert_equal_counts(counts, 6000)


def test_every_drawing_is_equally_likely_to_be_learnt_from(named_images, seeded):
    x, _ = Omniglot(named_images, SPLITS).sample(2000, generator=seeded(1))["support"]
    assert_equal_counts(names(x)[1].flatten().bincount(minlength=20), 10_000)


@pytest.mark.parametrize("part", ["support", "query"])
def test_every_place_of_an_episode_has_every_label_equally_often(named_images, seeded, part):
    omniglot = Omniglot(named_images, SPLITS, way=5, shot=2, query_shots=3)
    _, y = omniglot.sample(5000, generator=seeded(2))[part]
    for place in y.unbind(1):
        assert_equal_counts(place.bincount(minlength=5), 5000)


def test_rotations_are_classes_of_the_split_of_their_character(seeded):
    images = torch.randint(256, (9, 4, 28, 28), dtype=torch.uint8, generator=seeded(3))
    splits = SPLITS[:9]
    omniglot = Omniglot(images, splits, way=12, shot=1, query_shots=1, rotations=True)
    for number, split in enumerate(("train", "validation", "test")):
        turned = {
            np.rot90(images[character, drawing].numpy(), turns).tobytes(): (character, turns)
            for character in (splits == number).nonzero().flatten().tolist()
            for drawing in range(4)
            for turns in range(4)
        }
        x, y = omniglot.sample(1, split=split, generator=seeded(4))["support"]
        found = [turned[(image * 255).byte().numpy().tobytes()] for image in x[0, :, 0]]
        assert len(set(found)) == 12, "3 characters in 4 directions"
        assert y[0].sort().values.tolist() == list(range(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_the_bytes_divided_by_255_in_the_dtype_asked_for(seeded, dtype):
    images = torch.full((5, 20, 28, 28), 51, dtype=torch.uint8)
    x, y = Omniglot(images, torch.zeros(5), dtype=dtype).sample(1, generator=seeded(0))["support"]
    assert (x.dtype, y.dtype) == (dtype, torch.int64)
    assert torch.equal(x, torch.full_like(x, 51 / 255))


@pytest.mark.parametrize("rotations", [False, True])
@pytest.mark.parametrize(
    ("split_scheme", "counts"),
    [
        ("vinyals", [1028, 172, 423]),
        ("background", [964, 0, 659]),
        ("background_validation", [792, 172, 659]),
    ],
)
def test_real_splits_are_disjoint_and_of_the_known_sizes(
    omniglot_npz, split_scheme, counts, rotations
):
    omniglot = Omniglot.from_npz(omniglot_npz, split_scheme=split_scheme, rotations=rotations)
    characters = [set((classes % 1623).tolist()) for classes in omniglot.classes.values()]
    assert [len(classes) for classes in characters] == counts
    assert len(set.union(*characters)) == 1623
    assert sum(map(len, omniglot.classes.values())) == 1623 * (4 if rotations else 1)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_real_episode_is_that_of_a_naive_numpy_sampler(omniglot_npz, seeded, split):
    way, shot, query_shots = 5, 2, 3
    tasks = Omniglot.from_npz(omniglot_npz, way=way, shot=shot, query_shots=query_shots).sample(
        1, split=split, generator=seeded(5)
    )
    with np.load(omniglot_npz) as archive:
        images = archive["images"]
        number = ["train", "validation", "test"].index(split)
        pool = [c for c, of in enumerate(archive["vinyals_split"]) if of == number]
    generator = seeded(5)

    def order(count):
        """Descending order of uniform draws, the sampler's stand-in for a permutation."""
        return np.argsort(-torch.rand(count, generator=generator).numpy())

    characters = [pool[c] for c in order(len(pool))[:way]]
    drawings = [order(20)[: shot + query_shots] for _ in range(way)]
    for part, chosen in (("support", slice(shot)), ("query", slice(shot, None))):
        examples = [
            (images[character, drawing] / np.float32(255), label)
            for label, character in enumerate(characters)
            for drawing in drawings[label][chosen]
        ]
        examples = [examples[place] for place in order(len(examples))]
        x, y = tasks[part]
        np.testing.assert_array_equal(
            x[0, :, 0].numpy(), np.stack([image for image, _ in examples])
        )
        assert y[0].tolist() == [label for _, label in examples]


def test_a_split_without_characters_cannot_be_sampled(named_images, seeded):
    omniglot = Omniglot(named_images, torch.zeros(30))
    with pytest.raises(ValueError, match="expected a split with characters, found none in 'test'"):
        omniglot.sample(1, split="test", generator=seeded(0))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"way": 11}, ValueError, "way to be at most the 10 classes of split 'train', found 11"),
        ({"way": 41, "rotations": True}, ValueError, "at most the 40 classes of split 'train'"),
        ({"shot": 6}, ValueError, r"at most the 20 drawings of a character, found 6 \+ 15"),
        ({"way": 0}, ValueError, "expected way to be at least 1, found 0"),
        ({"shot": 0}, ValueError, "expected shot to be at least 1, found 0"),
        ({"query_shots": -1}, ValueError, "expected query_shots to be at least 1, found -1"),
        ({"dtype": torch.uint8}, TypeError, "expected a floating dtype, found torch.uint8"),
    ],
)
def test_bad_options_are_named(named_images, options, error, sentence):
    with pytest.raises(error, match=sentence):
        Omniglot(named_images, SPLITS, **options)


@pytest.mark.parametrize(
    ("images", "splits", "error", "sentence"),
    [
        (torch.zeros(30, 20, 28, 28), SPLITS, TypeError, "uint8, found torch.float32"),
        (torch.zeros(30, 20, 784).byte(), SPLITS, ValueError, r"28, 28\], found \[30, 20, 784\]"),
        (torch.zeros(30, 20, 28, 32).byte(), SPLITS, ValueError, r"found \[30, 20, 28, 32\]"),
        (
            torch.zeros(30, 20, 28, 28).byte(),
            SPLITS[:9],
            ValueError,
            r"30 characters, found .*\[9\]",
        ),
        (torch.zeros(30, 20, 28, 28).byte(), SPLITS + 1, ValueError, r"2 \(test\), found 3"),
        (torch.zeros(30, 20, 28, 28).byte(), SPLITS - 1, ValueError, r"2 \(test\), found -1"),
    ],
)
def test_tensors_that_are_no_characters_are_named(images, splits, error, sentence):
    with pytest.raises(error, match=sentence):
        Omniglot(images, splits)
