"""Reading Omniglot from folders of drawings, as torchvision downloads them."""

import hashlib
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradagree_opt.tasks import Omniglot
from gradagree_opt.tasks.omniglot_files import folder_split, read_drawing, read_folder, read_npz

CHARACTERS = {
    "images_background/Greek": [1, 2, 3],
    "images_background/Hebrew": [1, 2],
    "images_evaluation/Gurmukhi": [41, 42],
    "images_evaluation/ULOG": [1, 2],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine characters of three black and white drawings each, as Omniglot comes."""
    root = tmp_path_factory.mktemp("torchvision") / "omniglot-py"
    pixels = np.random.default_rng(0)
    for alphabet, numbers in CHARACTERS.items():
        for number in numbers:
            character = root / alphabet / f"character{number:02}"
            character.mkdir(parents=True)
            for drawing in range(1, 4):
                paper = np.kron(pixels.integers(0, 2, (15, 15)), np.ones((7, 7))).astype(bool)
                Image.fromarray(paper).save(character / f"0001_{drawing:02}.png")
    return root


def lanczos_28(image):
    """A 105×105 image of floats resized by the definition of Lanczos' three-lobed filter."""
    scale = 105 / 28
    offsets = (np.arange(105) + 0.5 - (np.arange(28)[:, None] + 0.5) * scale) / scale
    weights = np.sinc(offsets) * np.sinc(offsets / 3) * (np.abs(offsets) < 3)
    weights /= weights.sum(1, keepdims=True)
    rows = (image @ weights.T).clip(0, 255)
    return (weights @ rows).clip(0, 255)


def test_a_folder_is_read_alphabet_by_alphabet(folder):
    images, splits = read_folder(folder.parent, "vinyals", download=False)
    assert images.shape == (9, 3, 28, 28)
    assert splits.tolist() == [0, 0, 0, 1, 1, 0, 2, 2, 2]
    assert (
        read_folder(folder.parent, "background", download=False).splits.tolist()
        == [0] * 5 + [2] * 4
    )
    assert (
        read_folder(folder.parent, "background_validation", download=False).splits.tolist()
        == [0] * 3 + [1] * 2 + [2] * 4
    )
    last = read_drawing(folder / "images_evaluation/ULOG/character02/0001_03.png")
    assert torch.equal(images[8, 2], last)


def test_a_drawing_is_resized_by_lanczos_and_inverted(folder):
    for path in folder.glob("images_background/Greek/*/*.png"):
        original = np.asarray(Image.open(path).convert("L"), dtype=float)
        expected = 255 - lanczos_28(original)
        # Pillow rounds to bytes after each of the two passes
        assert np.abs(read_drawing(path).numpy() - expected).max() < 2


def test_paper_is_0_and_ink_255(tmp_path):
    for paper, value in ((True, 0), (False, 255)):
        Image.fromarray(np.full((105, 105), paper)).save(tmp_path / "drawing.png")
        assert read_drawing(tmp_path / "drawing.png").unique().tolist() == [value]


def test_folder_and_archive_of_the_same_characters_give_the_same_tasks(tmp_path, folder, seeded):
    images, splits = read_folder(folder.parent, "vinyals", download=False)
    np.savez(tmp_path / "omniglot.npz", images=images.numpy(), vinyals_split=splits.numpy())
    options = {"way": 2, "shot": 1, "query_shots": 2}
    sources = (
        Omniglot.from_torchvision(folder.parent, **options),
        Omniglot.from_npz(tmp_path / "omniglot.npz", **options),
    )
    ours, theirs = (source.sample(3, split="test", generator=seeded(0)) for source in sources)
    for part in ("support", "query"):
        assert all(torch.equal(a, b) for a, b in zip(ours[part], theirs[part], strict=True))


@pytest.mark.parametrize("split_scheme", ["vinyals", "background", "background_validation"])
def test_the_alphabets_of_a_split_are_those_of_the_real_archive(omniglot_npz, split_scheme):
    with np.load(omniglot_npz) as archive:
        alphabets = archive["alphabets"][archive["alphabet"]]
        part = np.where(archive["background"], "images_background", "images_evaluation")
        splits = [
            folder_split(Path(part, alphabet, f"character{number:02}"), split_scheme)
            for part, alphabet, number in zip(part, alphabets, archive["character"], strict=True)
        ]
    expected = read_npz(omniglot_npz, split_scheme).splits
    assert splits == [("train", "validation", "test")[number] for number in expected]


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a line on stderr for each."""

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder and its address on a server of this machine."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "served").mkdir()
    handler = partial(QuietHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_torchvision_downloads_both_parts(tmp_path, folder, served, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    web, address = served
    checksums = {}
    for part in ("images_background", "images_evaluation"):
        archive = shutil.make_archive(str(web / part), "zip", folder, part)
        checksums[part] = hashlib.md5(Path(archive).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", address)
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", checksums)
    options = {"way": 2, "shot": 1, "query_shots": 2}
    fetched = Omniglot.from_torchvision(tmp_path / "new", download=True, **options)
    assert torch.equal(fetched.images, Omniglot.from_torchvision(folder.parent, **options).images)


def test_torchvision_is_needed_only_for_what_is_missing(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    images, _ = read_folder(folder.parent, "vinyals", download=True)
    assert images.shape == (9, 3, 28, 28)
    with pytest.raises(ImportError, match="needs torchvision: pip install torchvision"):
        read_folder(tmp_path, "vinyals", download=True)


@pytest.mark.parametrize("part", ["images_background", "images_evaluation"])
def test_a_missing_folder_is_named(tmp_path, folder, part):
    shutil.copytree(folder, tmp_path / "omniglot-py", ignore=shutil.ignore_patterns(part))
    with pytest.raises(
        FileNotFoundError, match=f"{part}, found no such folder: pass download=True"
    ):
        Omniglot.from_torchvision(tmp_path)


def test_characters_with_unequal_numbers_of_drawings_are_named(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "omniglot-py")
    (tmp_path / "omniglot-py/images_background/Greek/character01/0001_01.png").unlink()
    with pytest.raises(ValueError, match=r"same number of drawings .* found numbers \[2, 3\]"):
        Omniglot.from_torchvision(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no picture", "cut off", "flipped"])
def test_a_damaged_drawing_is_named(tmp_path, folder, content):
    path = tmp_path / "omniglot-py/images_background/Greek/character01/0001_01.png"
    shutil.copytree(folder, tmp_path / "omniglot-py")
    whole = path.read_bytes()
    half = len(whole) // 2
    damaged = {"cut off": whole[:half], "flipped": whole[:half] + b"\0\0" + whole[half + 2 :]}
    path.write_bytes(damaged.get(content, content))
    with pytest.raises(ValueError, match=f"expected a PNG at {path}, found a damaged") as caught:
        Omniglot.from_torchvision(tmp_path, way=2, query_shots=1)
    assert "\n" not in str(caught.value)


def test_empty_folders_are_named(tmp_path):
    for part in ("images_background", "images_evaluation"):
        (tmp_path / "omniglot-py" / part).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"same number of drawings .* found numbers \[\]"):
        Omniglot.from_torchvision(tmp_path)


@pytest.mark.parametrize(
    ("module", "read", "install"),
    [
        ("numpy.lib.format", lambda path: read_npz(path, "vinyals"), "pip install numpy"),
        ("PIL", read_drawing, "pip install pillow"),
        ("torchvision", lambda path: Omniglot.from_torchvision(path, download=True), "torchvision"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch, module, read, install
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=install):
        read(tmp_path / "absent")
