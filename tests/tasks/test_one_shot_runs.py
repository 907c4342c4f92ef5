"""The official one-shot runs of Omniglot, against the raw arrays and in every unsound form."""

import numpy as np
import pytest
import torch
from PIL import Image

from gradagree_opt.tasks import Omniglot


@pytest.fixture
def arrays(named_images):
    """Two runs of three characters, the query sets in other orders and of other drawings."""
    characters = np.array([[4, 2, 9], [11, 10, 12]])
    shuffled = np.array([[9, 4, 2], [10, 12, 11]])
    return {
        "images": named_images.numpy(),
        "oneshot_train": np.stack([characters, characters + 1], 2).astype(np.int16),
        "oneshot_test": np.stack([shuffled, shuffled + 2], 2).astype(np.int16),
    }


def write(path, arrays):
    np.savez(path / "omniglot.npz", **arrays)
    return path / "omniglot.npz"


def test_the_real_runs_are_those_of_a_naive_loop(omniglot_npz):
    tasks = Omniglot.one_shot_runs(omniglot_npz)
    with np.load(omniglot_npz) as archive:
        images, train, test = (archive[n] for n in ("images", "oneshot_train", "oneshot_test"))
        alphabet, background = archive["alphabet"], archive["background"]
    for part in ("support", "query"):
        x, y = tasks[part]
        assert (x.shape, x.dtype) == ((20, 20, 1, 28, 28), torch.float32)
        assert (y.shape, y.dtype) == ((20, 20), torch.int64)
    for run in range(20):
        label_of = {}
        for place, (character, drawing) in enumerate(train[run]):
            x, y = (tensor[run, place] for tensor in tasks["support"])
            assert np.array_equal(x[0].numpy(), images[character, drawing] / np.float32(255))
            label_of[character] = y.item()
        assert sorted(label_of.values()) == list(range(20))
        assert len({alphabet[character] for character in label_of}) == 1
        assert not background[list(label_of)].any()
        for place, (character, drawing) in enumerate(test[run]):
            x, y = (tensor[run, place] for tensor in tasks["query"])
            assert np.array_equal(x[0].numpy(), images[character, drawing] / np.float32(255))
            assert y.item() == label_of[character]


def test_drawings_are_matched_by_character_and_not_by_place(tmp_path, arrays):
    tasks = Omniglot.one_shot_runs(write(tmp_path, arrays), dtype=torch.float64)
    for part, step in (("support", 1), ("query", 2)):
        x, _ = tasks[part]
        assert x.dtype == torch.float64
        character, drawing = (x[..., 0, 0, pixel] * 255 for pixel in (0, 1))
        torch.testing.assert_close(drawing, character + step)
    assert tasks["support"][1].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert tasks["query"][1].tolist() == [[2, 0, 1], [1, 2, 0]]


def test_what_is_learnt_from_one_drawing_can_be_asked_of_the_other(omniglot_npz):
    # Nearest pixels are a poor classifier, but far from the 5 % of chance where labels match.
    (x, y), (query, expected) = Omniglot.one_shot_runs(omniglot_npz).values()
    nearest = torch.cdist(query.flatten(2), x.flatten(2)).argmin(2)
    assert (y.gather(1, nearest) == expected).float().mean() > 0.2


DAMAGES = {
    "other shape": ({"oneshot_test": np.zeros((2, 3), int)}, r"found \[2, 3, 2\] and \[2, 3\]"),
    "other runs": ({"oneshot_test": np.zeros((1, 3, 2), int)}, r"and \[1, 3, 2\]"),
    "no pairs": (
        {name: np.zeros((2, 3, 3), int) for name in ("oneshot_train", "oneshot_test")},
        r"of shape \[runs, way, 2\], found \[2, 3, 3\]",
    ),
    "no such drawing": (
        {"oneshot_train": np.full((2, 3, 2), 20)},
        r"below \[30, 20\] in oneshot_train of .*, found \[20, 20\] at most",
    ),
    "negative": ({"oneshot_test": np.full((2, 3, 2), -1)}, r"below \[30, 20\] in oneshot_test"),
    "other characters": ({"oneshot_test": np.ones((2, 3, 2), int)}, "found a run that has not"),
    "one character": (
        {name: np.ones((2, 3, 2), int) for name in ("oneshot_train", "oneshot_test")},
        "the same different characters",
    ),
    "flat images": ({"images": np.zeros((30, 20, 784), np.uint8)}, r"found \[30, 20, 784\]"),
    "pickle": ({"oneshot_test": np.array([{}], object)}, "'oneshot_test' in .* pickled object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_run_is_one_sentence(tmp_path, arrays, damage):
    changes, sentence = DAMAGES[damage]
    with pytest.raises(ValueError, match=sentence) as caught:
        Omniglot.one_shot_runs(write(tmp_path, arrays | changes))
    assert "\n" not in str(caught.value)


def test_an_archive_without_runs_a_missing_one_and_a_dtype_are_named(tmp_path, arrays):
    with pytest.raises(FileNotFoundError, match="found no file there"):
        Omniglot.one_shot_runs(tmp_path / "omniglot.npz")
    path = write(tmp_path, arrays)
    with pytest.raises(TypeError, match=r"expected a floating dtype, found torch\.uint8"):
        Omniglot.one_shot_runs(path, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"of dtype torch\.uint8, found torch\.int64"):
        Omniglot.one_shot_runs(write(tmp_path, arrays | {"images": arrays["images"].astype(int)}))
    del arrays["oneshot_train"]
    with pytest.raises(ValueError, match=r"found none named \['oneshot_train'\]"):
        Omniglot.one_shot_runs(write(tmp_path, arrays))


LABELS = [[("item01", "class03"), ("item02", "class01"), ("item03", "class02")]] * 2
"""Of each run, as in Lake et al.'s all_runs.zip."""


@pytest.fixture
def folder(tmp_path):
    """Two runs of three characters, whose drawings are 28×28 and differ in one grey."""
    for run, pairs in enumerate(LABELS, start=1):
        place = tmp_path / f"run{run:02}"
        lines = []
        for number, (query, support) in enumerate(pairs):
            for part, name, grey in (("test", query, 50), ("training", support, 100)):
                (place / part).mkdir(parents=True, exist_ok=True)
                paper = np.full((28, 28), grey + 10 * number + run, np.uint8)
                Image.fromarray(paper).save(place / part / f"{name}.png")
            lines.append(f"run{run:02}/test/{query}.png run{run:02}/training/{support}.png\n")
        (place / "class_labels.txt").write_text("".join(lines))
    return tmp_path


def test_the_runs_as_lake_et_al_give_them(folder):
    tasks = Omniglot.one_shot_runs(folder, dtype=torch.float64)
    (x, y), (query, expected) = tasks.values()
    assert (x.shape, query.shape) == ((2, 3, 1, 28, 28),) * 2
    assert (255 - 255 * x[..., 0, 0, 0]).round().tolist() == [[111, 121, 101], [112, 122, 102]]
    assert (255 - 255 * query[..., 0, 0, 0]).round().tolist() == [[51, 61, 71], [52, 62, 72]]
    assert y.tolist() == [[0, 1, 2]] * 2 and expected.tolist() == [[2, 0, 1]] * 2
    torch.testing.assert_close(x, x[..., :1, :1].expand_as(x))


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "expected in every line of"),
        ("run02/test/item01.png\n", "expected in every line of"),
        ("run02/test/item01.png run02/training/class01.png\n" * 2, "each named once"),
        ("run02/test/item01.png run02/training/class03.png\n", r"one number.*found \[1, 3\]"),
    ],
)
def test_a_list_that_is_none_is_one_sentence(folder, lines, sentence):
    (folder / "run02" / "class_labels.txt").write_text(lines)
    with pytest.raises(ValueError, match=sentence):
        Omniglot.one_shot_runs(folder)


def test_a_folder_without_runs_and_a_missing_drawing_are_named(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=r"all_runs\.zip, in .*empty.*, found none"):
        Omniglot.one_shot_runs(empty)
    (folder / "run01" / "test" / "item02.png").unlink()
    with pytest.raises(ValueError, match=r"expected a PNG at .*item02\.png"):
        Omniglot.one_shot_runs(folder)
