"""mini-ImageNet's format: a small set made with Pillow, its cache, and everything wrong with it."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradagree_opt.tasks import MiniImageNet
from gradagree_opt.tasks import mini_imagenet_files as files_module
from gradagree_testing.pickles import Trap

CLASSES = {"train.csv": 4, "val.csv": 3, "test.csv": 3}
IMAGES = 5


def colour(number, image):
    """The colour of an image: its class in red, its place in the class in green."""
    return (number * 25, image * 40, 128)


@pytest.fixture
def root(tmp_path):
    """Ten classes of five images of one colour each, 100 × 90 pixels; lists in mixed order."""
    number = 0
    for name, count in CLASSES.items():
        lines = []
        for _ in range(count):
            label = f"n{number:08}"
            (tmp_path / label).mkdir()
            for image in range(IMAGES):
                picture = Image.new("RGB", (100, 90), colour(number, image))
                picture.save(tmp_path / label / f"{label}{image:08}.jpg", quality=95)
                lines.append(f"{label}{image:08}.jpg,{label}")
            number += 1
        mixed = [lines[place] for place in torch.randperm(len(lines)).tolist()]
        (tmp_path / name).write_text("\n".join(["filename,label", *mixed, ""]))
    return tmp_path


def images_of(x):
    """Class and place of each image, read from its colours."""
    return (x[:, :, 0].mean((2, 3)) * 255 / 25).round(), (
        x[:, :, 1].mean((2, 3)) * 255 / 40
    ).round()


@pytest.mark.parametrize(("split", "own"), [("train", range(4)), ("validation", range(4, 7))])
def test_a_task_tells_different_images_of_classes_of_its_split_apart(root, split, own, seeded):
    mini = MiniImageNet(root, way=3, shot=2, query_shots=3)
    tasks = mini.sample(30, split=split, generator=seeded(0))
    (x, y), (x_query, y_query) = tasks["support"], tasks["query"]
    assert x.shape == (30, 6, 3, 84, 84) and x_query.shape == (30, 9, 3, 84, 84)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    classes, places = images_of(torch.cat([x, x_query], 1))
    labels = torch.cat([y, y_query], 1)
    for task in range(30):
        pairs = set(zip(classes[task].tolist(), labels[task].tolist(), strict=True))
        assert len(pairs) == len({label for _, label in pairs}) == 3
        assert {number for number, _ in pairs} <= set(own)
        drawn = set(zip(classes[task].tolist(), places[task].tolist(), strict=True))
        assert len(drawn) == 15  # no image is in a task twice
        assert y[task].bincount().tolist() == [2, 2, 2]
    assert len({tuple(row) for row in y.tolist()}) > 1


def test_colours_are_red_green_blue_between_0_and_1(root, seeded):
    x, _ = MiniImageNet(root, way=3, shot=1, query_shots=1).sample(9, generator=seeded(1))["query"]
    assert x[:, :, 2].mean().item() == pytest.approx(128 / 255, abs=0.01)
    classes, places = images_of(x)
    expected = torch.stack([classes * 25 / 255, places * 40 / 255], 2)
    torch.testing.assert_close(x[:, :, :2].mean((3, 4)), expected, rtol=0, atol=0.02)


def test_images_are_resized_by_the_whole_picture(root, seeded):
    gradient = np.broadcast_to(np.linspace(0, 255, 200)[None, :, None], (150, 200, 3))
    for path in root.glob("n*/*.jpg"):
        Image.fromarray(gradient.astype(np.uint8)).save(path, quality=95)
    x, _ = MiniImageNet(root, way=2, shot=1, query_shots=1).sample(1, generator=seeded(2))["query"]
    expected = (torch.arange(84) + 0.5) / 84
    torch.testing.assert_close(x[0, 0].mean((0, 1)), expected, rtol=0, atol=0.02)


def test_classes_of_unequal_size_are_drawn_from_whole(root, seeded):
    text = (root / "train.csv").read_text().splitlines()
    left_out = [line for line in text if not line.endswith("00000003.jpg,n00000000")]
    (root / "train.csv").write_text("\n".join(left_out))
    tasks = MiniImageNet(root, way=3, shot=1, query_shots=3).sample(50, generator=seeded(3))
    classes, places = images_of(torch.cat([tasks["support"][0], tasks["query"][0]], 1))
    assert set(places[classes == 0].tolist()) == {0, 1, 2, 4}
    assert set(places[classes == 1].tolist()) == {0, 1, 2, 3, 4}


def test_images_are_decoded_once_and_the_same_tasks_come_from_the_cache(root, seeded, monkeypatch):
    first = MiniImageNet(root, way=3, shot=1, query_shots=2).sample(4, generator=seeded(4))
    assert sorted(path.name.split("-")[0] for path in (root / "cache").iterdir()) == [
        "test",
        "train",
        "validation",
    ]
    monkeypatch.setattr(files_module, "read_image", None)
    again = MiniImageNet(root, way=3, shot=1, query_shots=2).sample(4, generator=seeded(4))
    for part in ("support", "query"):
        assert all(torch.equal(a, b) for a, b in zip(first[part], again[part], strict=True))


def test_the_cache_may_lie_elsewhere_and_the_data_be_read_only(root, tmp_path_factory, seeded):
    cache = tmp_path_factory.mktemp("elsewhere") / "cache"
    before = set(root.rglob("*"))
    MiniImageNet(root, way=3, shot=1, query_shots=2, cache=cache)
    assert set(root.rglob("*")) == before
    assert len(list(cache.iterdir())) == 3


def test_what_the_data_may_not_hold_goes_to_the_users_cache_for_each_folder_apart(
    root, tmp_path_factory, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
    other = tmp_path_factory.mktemp("other") / "mini"
    shutil.copytree(root, other)
    for path in other.glob("n*/*.jpg"):
        Image.new("RGB", (100, 90), (1, 2, 3)).save(path)
    for folder in (root, other):
        (folder / "cache").touch()  # in place of a folder: one without rights would not stop root
    found = [MiniImageNet(folder, way=3, shot=1, query_shots=2) for folder in (root, other, root)]
    pixels = [mini.images["train"].pixels for mini in found]
    assert torch.equal(pixels[0], pixels[2])
    assert pixels[1].amax() < 10 < pixels[0].amax()
    assert len(list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npy"))) == 6


def test_arrays_beside_the_images_are_read_whether_or_not_they_could_be_written(
    root, tmp_path_factory, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
    MiniImageNet(root, way=3, shot=1, query_shots=2)
    monkeypatch.setattr(files_module, "first_writable", None)
    MiniImageNet(root, way=3, shot=1, query_shots=2)
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).iterdir())


def test_a_changed_list_is_decoded_anew(root):
    first = MiniImageNet(root, way=3, shot=1, query_shots=2)
    lines = (root / "val.csv").read_text().splitlines()
    (root / "val.csv").write_text("\n".join(lines[:1] + lines[:0:-1]))
    again = MiniImageNet(root, way=3, shot=1, query_shots=2)
    assert torch.equal(first.images["validation"].pixels.flip(0), again.images["validation"].pixels)
    assert torch.equal(first.images["train"].pixels, again.images["train"].pixels)
    assert len(list((root / "cache").iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut off", "empty", "pickle", "other shape"])
def test_a_cache_that_is_damaged_or_a_pickle_is_made_anew_and_never_unpickled(root, damage):
    expected = MiniImageNet(root, way=3, shot=1, query_shots=2).images["train"].pixels.clone()
    (path,) = (root / "cache").glob("train-*.npy")
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Trap(root / "sprung")))
    else:
        np.save(path, np.zeros((3, 3), np.uint8))
    found = MiniImageNet(root, way=3, shot=1, query_shots=2).images["train"].pixels
    assert torch.equal(found, expected)
    assert path.read_bytes() == whole
    assert not (root / "sprung").exists()


def test_a_decoding_that_is_interrupted_leaves_no_cache(root, monkeypatch):
    read, calls = files_module.read_image, []

    def interrupted(path):
        calls.append(path)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(files_module, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MiniImageNet(root, way=3, shot=1, query_shots=2)
    assert list((root / "cache").iterdir()) == []


def image(root):
    return root / "n00000001" / "n0000000100000002.jpg"


VALIDATION_LINE = "n0000000500000002.jpg,n00000005"
DAMAGES = {
    "no list": (lambda root: (root / "val.csv").unlink(), r"a split list at .*val\.csv, found no"),
    "no folder": (
        lambda root: (root / "n00000002").rename(root / "other"),
        r"images of class 'n00000002', which .*train\.csv names, in .*, found no such folder",
    ),
    "no image": (lambda root: image(root).unlink(), r"image at .*0002\.jpg, which .*train\.csv"),
    "damaged image": (
        lambda root: image(root).write_bytes(image(root).read_bytes()[:200]),
        r"expected a JPEG at .*n0000000100000002\.jpg, found a damaged one",
    ),
    "text as image": (
        lambda root: image(root).write_text("no picture"),
        r"expected a JPEG at .*n0000000100000002\.jpg, found a damaged one or a file of another",
    ),
    "no columns": (
        lambda root: (root / "test.csv").write_text("a,b\n1,2\n"),
        r"columns filename and label in .*test\.csv, found 1 with the columns \['a', 'b'\]",
    ),
    "no lines": (
        lambda root: (root / "test.csv").write_text("filename,label\n"),
        r"columns filename and label in .*test\.csv, found 0 with the columns",
    ),
    "no text": (
        lambda root: (root / "test.csv").write_bytes(b"\xff\xfe\x00"),
        "to be a split list",
    ),
    "two splits": (
        lambda root: (root / "test.csv").write_text((root / "val.csv").read_text()),
        r"no class in two split lists, found 'n0000000[456]' in .*val\.csv and .*test\.csv",
    ),
    "a line twice": (
        lambda root: (root / "val.csv").write_text(
            "\n".join([*(root / "val.csv").read_text().splitlines(), "", VALIDATION_LINE])
        ),
        r"every image once in .*val\.csv, found n00000005/n0000000500000002\.jpg more often",
    ),
    "elsewhere": (
        lambda root: (root / "test.csv").write_text("filename,label\n../x.jpg,n00000001\n"),
        r"expected names without folders in .*test\.csv, found '\.\./x\.jpg'",
    ),
    "short line": (
        lambda root: (root / "test.csv").write_text("filename,label\nx.jpg\n"),
        r"expected names without folders in .*test\.csv, found None",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_or_damaged_is_one_sentence(root, damage):
    spoil, sentence = DAMAGES[damage]
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        MiniImageNet(root, way=3, shot=1, query_shots=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"way": 4}, ValueError, "way to be at most the 3 classes of split 'validation', found 4"),
        ({"shot": 4}, ValueError, r"at most the 5 images of the smallest .*'train', found 4 \+ 2"),
        ({"shot": 0}, ValueError, "expected shot to be at least 1, found 0"),
        ({"dtype": torch.uint8}, TypeError, "expected a floating dtype, found torch.uint8"),
    ],
)
def test_bad_options_are_named(root, options, error, sentence):
    with pytest.raises(error, match=sentence):
        MiniImageNet(root, **{"way": 3, "shot": 1, "query_shots": 2} | options)
