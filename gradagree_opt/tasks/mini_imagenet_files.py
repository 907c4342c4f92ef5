"""Reads mini-ImageNet from class folders of JPEGs, decoded once into memory-mapped arrays."""

import csv
import hashlib
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradagree_opt.annotations import Int
from gradagree_opt.replacing import replacing

SIDE = 84
LISTS = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}


class Images(NamedTuple):
    """The images of one split."""

    pixels: Tensor
    """uint8 ``[images, 3, 84, 84]``, memory-mapped: only what is looked at is read."""
    classes: Int[Tensor, "classes widest"]
    """The rows of each class, filled up with -1 to the largest one's number."""


class SplitList(NamedTuple):
    """The images that a split list names, in its order, and their classes."""

    path: Path
    files: list[Path]
    labels: list[str]

    def key(self) -> str:
        """A hash of what the list names, and of the size that images are brought to."""
        names = [f"{file.parent.name}/{file.name}" for file in self.files]
        return hashlib.sha256("\n".join([str(SIDE), *names]).encode()).hexdigest()[:12]


def cache_folders(root: Path, /) -> list[Path]:
    """Where the arrays may lie: beside the images, or in the user's cache where that is read-only.

    There each ``root`` has a folder of its own: lists of one content may name other images.
    """
    beside = root / "cache"
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a container's user may have no home
        return [beside]
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:12]
    return [beside, base / "gradagree-opt" / f"mini-imagenet-{name}"]


def read_splits(root: Path, caches: list[Path], /) -> dict[str, Images]:
    """The three splits in ``root``, whose classes are disjoint.

    Arrays are read from the first of the cache folders that has them, and written to the first that
    can be written to. All that is missing or wrong in the lists and folders is found before an
    image is decoded.

    Raises:
        FileNotFoundError: a split list, the folder of a class or an image is not there.
        OSError: none of the cache folders can be written to.
        ValueError: a list is not one, names an image twice, two splits share a class, or an image
            is damaged.
    """
    lists = {split: read_list(root, name) for split, name in LISTS.items()}
    owners: dict[str, Path] = {}
    for listed in lists.values():
        for label in set(listed.labels):
            if owners.setdefault(label, listed.path) != listed.path:
                raise ValueError(
                    f"expected no class in two split lists, found {label!r} in "
                    f"{owners[label]} and {listed.path}"
                )
    return {
        split: Images(
            decoded(listed, [folder / f"{split}-{listed.key()}.npy" for folder in caches]),
            class_rows(listed.labels),
        )
        for split, listed in lists.items()
    }


def read_list(root: Path, name: str, /) -> SplitList:
    """A list with the columns filename and label; the images lie at ``root/label/filename``."""
    path = root / name
    rows = read_rows(path)
    for entry in (entry for row in rows for entry in (row["filename"], row["label"])):
        if not entry or entry == ".." or Path(entry).name != entry:
            raise ValueError(f"expected names without folders in {path}, found {entry!r}")
    files = [root / row["label"] / row["filename"] for row in rows]
    if repeated := [file for file, count in Counter(files).items() if count > 1]:
        raise ValueError(
            f"expected every image once in {path}, found {repeated[0].relative_to(root)} more often"
        )
    for folder in sorted({file.parent for file in files}):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"expected the images of class {folder.name!r}, which {path} names, in {folder}, "
                "found no such folder"
            )
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"expected an image at {file}, which {path} names, found no file there"
            )
    return SplitList(path, files, [row["label"] for row in rows])


def read_rows(path: Path, /) -> list[dict[str, str]]:
    """The lines of a split list, by the names of their columns."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a split list at {path}, found no file there")
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"expected {path} to be a split list, found no text: {error}") from None
    if not {"filename", "label"} <= set(columns) or not rows:
        raise ValueError(
            f"expected lines with the columns filename and label in {path}, "
            f"found {len(rows)} with the columns {list(columns)}"
        )
    return rows


def class_rows(labels: list[str], /) -> Int[Tensor, "classes widest"]:
    """For each class, in the order of their names, the places where it stands."""
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    rows = [torch.tensor(places[label]) for label in sorted(places)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def decoded(listed: SplitList, caches: list[Path], /) -> Tensor:
    """The images of a list from one of its caches; where all are absent or damaged, one is made."""
    import numpy as np

    shape = (len(listed.files), 3, SIDE, SIDE)
    for cache in caches:
        if (array := open_cache(cache, shape)) is not None:
            return torch.from_numpy(array)
    cache = first_writable(caches)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    # a map would end the process where the disk is full
    with replacing(cache) as temporary, temporary.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
        for file in listed.files:
            out.write(read_image(file).tobytes())
    return torch.from_numpy(open_cache(cache, shape))


def first_writable(paths: list[Path], /) -> Path:
    """The first of the files whose folder can be made and written to.

    Raises:
        OSError: there is none; the last one's reason.
    """
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError:
            if path == paths[-1]:
                raise
        else:
            break
    return path


def open_cache(path: Path, shape: tuple[int, ...], /) -> Any:
    """The array of a cache, or None where there is none of that shape; nothing is unpickled.

    It is mapped copy-on-write, since PyTorch takes no array that cannot be written to.
    """
    import numpy as np

    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(array, np.ndarray) and array.shape == shape and array.dtype == np.uint8
    return array if whole else None


def read_image(path: Path, /) -> Any:
    """One image as uint8 ``[3, 84, 84]``, resized by Lanczos' filter as in Finn et al. 2017."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install pillow") from error
    import numpy as np

    try:
        with Image.open(path, formats=["JPEG"]) as image:
            resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"expected a JPEG at {path}, found a damaged one or a file of another kind: {error}"
        ) from None
    return np.asarray(resized).transpose(2, 0, 1)
