"""Reading Omniglot from archives of every sound and unsound kind."""

import pickle
import zipfile

import numpy as np
import pytest

from gradagree_opt.tasks import Omniglot
from gradagree_opt.tasks.omniglot_files import read_npz
from gradagree_testing.pickles import Trap


@pytest.fixture
def arrays(named_images):
    """Members of a sound archive."""
    return {
        "images": named_images.numpy(),
        "vinyals_split": np.arange(30, dtype=np.uint8) % 3,
        "background": np.arange(30) < 20,
    }


@pytest.mark.parametrize("split_scheme", ["vinyals", "background", "background_validation"])
def test_an_archive_gives_its_images_and_splits(tmp_path, arrays, split_scheme):
    np.savez_compressed(tmp_path / "omniglot.npz", **arrays)
    images, splits = read_npz(tmp_path / "omniglot.npz", split_scheme)
    np.testing.assert_array_equal(images, arrays["images"])
    expected = {
        "vinyals": [0, 1, 2] * 10,
        "background": [0] * 20 + [2] * 10,
        "background_validation": [0, 1, 0] * 6 + [0, 1] + [2] * 10,
    }
    assert splits.tolist() == expected[split_scheme]


@pytest.mark.parametrize("dtype", ["uint64", "uint16", ">i4", "bool"])
def test_splits_are_integers_of_any_kind(tmp_path, arrays, dtype):
    arrays["vinyals_split"] = (arrays["vinyals_split"] % 2).astype(dtype)
    np.savez(tmp_path / "omniglot.npz", **arrays)
    omniglot = Omniglot.from_npz(tmp_path / "omniglot.npz")
    assert omniglot.classes["validation"].tolist() == [*range(1, 30, 3)]


@pytest.mark.parametrize("characters", [10**30, 10**12])
def test_a_header_of_a_shape_that_cannot_be_is_refused(tmp_path, arrays, characters):
    header = {"descr": "|u1", "fortran_order": False, "shape": (characters, 3, 28, 28)}
    np.savez(tmp_path / "omniglot.npz", vinyals_split=arrays["vinyals_split"])
    with (
        zipfile.ZipFile(tmp_path / "omniglot.npz", "a") as archive,
        archive.open("images.npy", "w") as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(ValueError, match=r"expected 'images' in .* found a damaged member"):
        Omniglot.from_npz(tmp_path / "omniglot.npz")


def test_only_the_members_that_the_scheme_needs_must_be_there(tmp_path, arrays):
    del arrays["vinyals_split"]
    np.savez(tmp_path / "omniglot.npz", **arrays)
    Omniglot.from_npz(tmp_path / "omniglot.npz", split_scheme="background")
    with pytest.raises(ValueError, match=r"found none named \['vinyals_split'\]"):
        Omniglot.from_npz(tmp_path / "omniglot.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no file there"):
        Omniglot.from_npz(tmp_path / "omniglot.npz")


@pytest.mark.parametrize("kind", ["text", "empty", "npy", "pickle", "truncated"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, arrays, kind):
    path = tmp_path / "omniglot.npz"
    np.savez(path, **arrays)
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, arrays["images"])
    else:
        content = {
            "text": b"images",
            "empty": b"",
            "pickle": pickle.dumps(arrays["images"]),
            "truncated": path.read_bytes()[:-1000],
        }
        path.write_bytes(content[kind])
    with pytest.raises(
        ValueError, match=r"to be an \.npz archive, found a damaged one or a file of"
    ):
        Omniglot.from_npz(path)


@pytest.mark.parametrize("member", ["images", "vinyals_split"])
def test_a_pickled_object_is_refused_and_never_loaded(tmp_path, arrays, member):
    arrays[member] = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(tmp_path / "omniglot.npz", **arrays)
    with pytest.raises(
        ValueError, match=f"expected '{member}' in .* pickled object, which is never"
    ):
        Omniglot.from_npz(tmp_path / "omniglot.npz")
    assert not (tmp_path / "sprung").exists()
    with np.load(tmp_path / "omniglot.npz", allow_pickle=True) as archive:
        archive[member]
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_a_damaged_member_is_named(tmp_path, arrays):
    path = tmp_path / "omniglot.npz"
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected 'images' in .* damaged member"):
        Omniglot.from_npz(path)


def test_a_member_of_text_is_named(tmp_path, arrays):
    np.savez(tmp_path / "omniglot.npz", **arrays | {"vinyals_split": np.array(["train"] * 30)})
    with pytest.raises(
        ValueError, match=r"expected 'vinyals_split' in .* to hold integers, found <U5"
    ):
        Omniglot.from_npz(tmp_path / "omniglot.npz")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "read", [Omniglot.from_npz, Omniglot.from_torchvision], ids=["npz", "torchvision"]
)
def test_an_unknown_split_scheme_is_named(tmp_path, read):
    with pytest.raises(ValueError, match=r"expected split_scheme to be one of .* found 'lake'"):
        read(tmp_path, split_scheme="lake")
