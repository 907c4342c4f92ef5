"""Reads Omniglot from disk: one .npz archive, or the folder of drawings that torchvision downloads."""

import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradagree_opt.annotations import Int
from gradagree_opt.tasks.protocol import SPLITS

SplitScheme = Literal["vinyals", "background"]
SIDE = 28

SPLIT_MEMBERS: dict[SplitScheme, str] = {"vinyals": "vinyals_split", "background": "background"}
PARTS = ("images_background", "images_evaluation")

# The split of Vinyals et al. 2016 as lists of characters circulate it follows alphabets, all but one.
VINYALS_VALIDATION = {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
VINYALS_TEST = {
    "Kannada",
    "Keble",
    "Malayalam",
    "Manipuri",
    "Mongolian",
    "Old_Church_Slavonic_(Cyrillic)",
    "Oriya",
    "Sylheti",
    "Syriac_(Serto)",
    "Tengwar",
    "Tibetan",
    "ULOG",
} | {f"Gurmukhi/character{number}" for number in range(42, 46)}


class Characters(NamedTuple):
    """Drawings of characters, and the split that each character is in."""

    images: Int[Tensor, "characters drawings 28 28"]
    """uint8, ink 255 on paper 0."""
    splits: Int[Tensor, " characters"]
    """Positions in ``("train", "validation", "test")``."""


def check_split_scheme(split_scheme: str, /) -> None:
    """Raise a ValueError when the scheme is none that exists."""
    if split_scheme not in get_args(SplitScheme):
        raise ValueError(
            f"expected split_scheme to be one of {get_args(SplitScheme)}, found {split_scheme!r}"
        )


def read_npz(path: Path, split_scheme: SplitScheme, /) -> Characters:
    """Characters of an archive with the members ``images`` and ``vinyals_split`` or ``background``.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: it is no .npz archive, a member is missing, damaged or a pickled object (which
            is never loaded), or ``split_scheme`` is unknown.
    """
    check_split_scheme(split_scheme)
    images, splits = read_members(path, ("images", SPLIT_MEMBERS[split_scheme]))
    if split_scheme == "background":
        splits = torch.where(splits.bool(), SPLITS.index("train"), SPLITS.index("test"))
    return Characters(images, splits)


def read_members(path: Path, names: tuple[str, ...], /) -> list[Tensor]:
    """Integer or boolean arrays of an .npz archive, without ever unpickling."""
    try:
        from numpy.lib.format import read_array
    except ImportError as error:
        raise ImportError("reading an .npz archive needs NumPy: pip install numpy") from error

    if not path.is_file():
        raise FileNotFoundError(
            f"expected an .npz archive of Omniglot at {path}, found no file there"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"expected {path} to be an .npz archive, found a file of another kind")
    with zipfile.ZipFile(path) as archive:
        missing = [name for name in names if f"{name}.npy" not in archive.namelist()]
        if missing:
            raise ValueError(
                f"expected members {list(names)} in {path}, found none named {missing}"
            )
        tensors = []
        for name in names:
            try:
                with archive.open(f"{name}.npy") as member:
                    array = read_array(member, allow_pickle=False)
            except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"expected {name!r} in {path} to be a plain array, found a damaged member or a "
                    f"pickled object, which is never loaded: {error}"
                ) from error
            if array.dtype.kind not in "biu":
                raise ValueError(
                    f"expected {name!r} in {path} to hold integers, found {array.dtype}"
                )
            tensors.append(torch.from_numpy(array))
    return tensors


def read_folder(folder: Path, split_scheme: SplitScheme, /) -> Characters:
    """Characters of ``folder/images_*/<alphabet>/<character>/*.png``, resized to 28×28.

    Drawings become greyscale before they are resized with Lanczos' filter: Pillow would resize the
    two-level originals by picking nearest pixels, which breaks thin strokes.

    Raises:
        FileNotFoundError: one of the two folders is not there.
        ValueError: there are no characters, they differ in their number of drawings, or
            ``split_scheme`` is unknown.
    """
    check_split_scheme(split_scheme)
    for part in PARTS:
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"expected the drawings of Omniglot in {folder / part}, found no such folder: "
                "pass download=True to fetch them"
            )
    characters = [path for part in PARTS for path in sorted((folder / part).glob("*/*/"))]
    drawings = [sorted(character.glob("*.png")) for character in characters]
    counts = {len(paths) for paths in drawings}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"expected characters with one and the same number of drawings in {folder}, "
            f"found numbers {sorted(counts)}"
        )
    images = torch.stack(
        [torch.stack([read_drawing(path) for path in paths]) for paths in drawings]
    )
    splits = [SPLITS.index(folder_split(path, split_scheme)) for path in characters]
    return Characters(images, torch.tensor(splits))


def folder_split(character: Path, split_scheme: SplitScheme, /) -> str:
    """Name of the split that the character in this folder belongs to."""
    part, alphabet, name = character.parts[-3:]
    if split_scheme == "background":
        return "train" if part == "images_background" else "test"
    if alphabet in VINYALS_VALIDATION:
        return "validation"
    return "test" if {alphabet, f"{alphabet}/{name}"} & VINYALS_TEST else "train"


def read_drawing(path: Path, /) -> Int[Tensor, "28 28"]:
    """One drawing as uint8, inverted so that ink is 255."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading drawings needs Pillow: pip install pillow") from error

    with Image.open(path) as image:
        resized = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return 255 - torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(SIDE, SIDE)
