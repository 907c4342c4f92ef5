"""Reads Omniglot from disk: an .npz archive, or the folder of drawings torchvision downloads."""

import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradagree_opt.options import check_choice
from gradagree_opt.tasks.protocol import SPLITS

SplitScheme = Literal["vinyals", "background", "background_validation"]
SIDE = 28

SPLIT_MEMBERS: dict[SplitScheme, tuple[str, ...]] = {
    "vinyals": ("vinyals_split",),
    "background": ("background",),
    "background_validation": ("background", "vinyals_split"),
}
PARTS = ("images_background", "images_evaluation")
DAMAGES = (
    ValueError,
    EOFError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
    OverflowError,  # this and the next: of a shape that is too large
    MemoryError,
)
"""What reading a damaged member of an archive raises."""

# The list that circulates as the split of Vinyals et al. 2016 divides one alphabet, Gurmukhi. All
# alphabets of its validation part are of the background set.
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

    images: Tensor
    """uint8 ``[characters, drawings, 28, 28]``, ink 255 on paper 0."""
    splits: Tensor
    """``[characters]``, positions in ``("train", "validation", "test")``."""


def read_npz(path: Path, split_scheme: SplitScheme, /) -> Characters:
    """Characters of an archive with the members ``images`` and those that the scheme needs.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: it is no .npz archive, a member is missing, damaged or a pickled object (which
            is never loaded), or ``split_scheme`` is unknown.
    """
    check_choice("split_scheme", split_scheme, get_args(SplitScheme))
    images, *members = read_members(path, ("images", *SPLIT_MEMBERS[split_scheme]))
    if split_scheme == "vinyals":
        return Characters(images, *members)
    background = members[0].bool()
    splits = torch.where(background, SPLITS.index("train"), SPLITS.index("test"))
    if split_scheme == "background_validation":
        number = SPLITS.index("validation")
        splits = torch.where(background & (members[1] == number), number, splits)
    return Characters(images, splits)


def check_images(images: Tensor, /) -> None:
    """Say in one sentence why these are not drawings of characters."""
    if images.dtype != torch.uint8:
        raise TypeError(f"expected images of dtype torch.uint8, found {images.dtype}")
    if images.dim() != 4 or images.shape[2:] != (SIDE, SIDE):
        raise ValueError(
            f"expected images of shape [characters, drawings, {SIDE}, {SIDE}], "
            f"found {list(images.shape)}"
        )


def read_members(path: Path, names: tuple[str, ...], /) -> list[Tensor]:
    """Arrays of an .npz archive, without ever unpickling: images as they are, the others int64."""
    try:
        from numpy.lib.format import read_array
    except ImportError as error:
        raise ImportError("reading an .npz archive needs NumPy: pip install numpy") from error

    if not path.is_file():
        raise FileNotFoundError(
            f"expected an .npz archive of Omniglot at {path}, found no file there"
        )
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"expected {path} to be an .npz archive, found a damaged one or a file of another kind"
        ) from error
    with archive:
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
            except DAMAGES as error:
                raise ValueError(
                    f"expected {name!r} in {path} to be a plain array, found a damaged member or a "
                    f"pickled object, which is never loaded: {error}"
                ) from error
            if array.dtype.kind not in "biu":
                raise ValueError(
                    f"expected {name!r} in {path} to hold integers, found {array.dtype}"
                )
            tensors.append(torch.from_numpy(array if name == "images" else array.astype("int64")))
    return tensors


def download_folder(root: Path, /) -> None:
    """Have torchvision fetch what is missing of Omniglot into ``root/omniglot-py``."""
    for part in PARTS:
        if (root / "omniglot-py" / part).is_dir():
            continue
        try:
            from torchvision import datasets

            datasets.Omniglot(root, background=part == "images_background", download=True)
        except ImportError as error:
            raise ImportError(
                "downloading Omniglot needs torchvision: pip install torchvision"
            ) from error
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"expected the drawings of Omniglot in {root / 'omniglot-py'}, found them neither "
                f"there nor by downloading: {error}"
            ) from None


def read_folder(root: Path, split_scheme: SplitScheme, /, *, download: bool) -> Characters:
    """Characters of ``root/omniglot-py/images_*/<alphabet>/<character>/*.png``, resized to 28×28.

    Drawings become greyscale before they are resized with Lanczos' filter, as in learn2learn:
    Pillow would resize the two-level originals by nearest pixels, which breaks thin strokes.

    Raises:
        FileNotFoundError: one of the two folders is not there, or cannot be fetched.
        ValueError: there are no characters, they differ in their number of drawings, or
            ``split_scheme`` is unknown.
    """
    check_choice("split_scheme", split_scheme, get_args(SplitScheme))
    if download:
        download_folder(root)
    folder = root / "omniglot-py"
    for part in PARTS:
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"expected the drawings of Omniglot in {folder / part}, found no such folder: "
                "pass download=True to fetch them"
            )
    characters = [
        path for part in PARTS for path in sorted((folder / part).glob("*/*")) if path.is_dir()
    ]
    drawings = [sorted(character.glob("*.png")) for character in characters]
    counts = {len(paths) for paths in drawings}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"expected characters with one and the same number of drawings in {folder}, "
            f"found numbers {sorted(counts)}"
        )
    splits = [SPLITS.index(folder_split(path, split_scheme)) for path in characters]
    return Characters(read_drawings(drawings), torch.tensor(splits))


def folder_split(character: Path, split_scheme: SplitScheme, /) -> str:
    """Name of the split that the character in this folder belongs to."""
    part, alphabet, name = character.parts[-3:]
    if split_scheme != "vinyals" and part == "images_evaluation":
        return "test"
    if split_scheme != "background" and alphabet in VINYALS_VALIDATION:
        return "validation"
    if split_scheme != "vinyals":
        return "train"
    return "test" if {alphabet, f"{alphabet}/{name}"} & VINYALS_TEST else "train"


def read_drawings(paths: list[list[Path]], /) -> Tensor:
    """Drawings as uint8 ``[*lengths of the lists, 28, 28]``."""
    return torch.stack([torch.stack([read_drawing(path) for path in row]) for row in paths])


def read_drawing(path: Path, /) -> Tensor:
    """One drawing as uint8 ``[28, 28]``, inverted so that ink is 255."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading drawings needs Pillow: pip install pillow") from error

    try:
        with Image.open(path, formats=["PNG"]) as image:
            resized = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"expected a PNG at {path}, found a damaged one or a file of another kind: {error}"
        ) from None
    return 255 - torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(SIDE, SIDE)
