"""Reads Omniglot from disk: an .npz archive, or the folder of drawings torchvision downloads."""

import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradagree_opt.tasks.protocol import SPLITS
from gradagree_opt.weightings import check_choice

SplitScheme = Literal["vinyals", "background", "background_validation"]
SIDE = 28

SPLIT_MEMBERS: dict[SplitScheme, tuple[str, ...]] = {
    "vinyals": ("vinyals_split",),
    "background": ("background",),
    "background_validation": ("background", "vinyals_split"),
}
PARTS = ("images_background", "images_evaluation")

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


class Examples(NamedTuple):
    """One drawing of each class of the official one-shot runs."""

    images: Tensor
    """uint8 ``[runs, way, 28, 28]``, ink 255 on paper 0."""
    classes: Tensor
    """int64 ``[runs, way]``, 0 … way - 1 in each run."""


def read_one_shot_runs(path: Path, /) -> tuple[Examples, Examples]:
    """Support and query examples of an archive with ``oneshot_train`` and ``oneshot_test``.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        TypeError: ``images`` is not uint8.
        ValueError: it is no .npz archive, or a member is missing, damaged, a pickled object (which
            is never loaded) or not what :meth:`Omniglot.one_shot_runs` describes.
    """
    images, *runs = read_members(path, ("images", "oneshot_train", "oneshot_test"))
    support, query = (drawings.long() for drawings in runs)
    check_images(images)
    check_one_shot_runs(path, images, support, query)
    # [runs, way, 1] against [runs, 1, way]: the place of each query's character in the support set
    same = query[..., :1] == support[..., 0].unsqueeze(1)
    places = torch.arange(support.shape[1]).expand(support.shape[:2])
    return (
        Examples(images[support[..., 0], support[..., 1]], places.clone()),
        Examples(images[query[..., 0], query[..., 1]], same.int().argmax(2)),
    )


def check_images(images: Tensor, /) -> None:
    """Say in one sentence why these are not drawings of characters."""
    if images.dtype != torch.uint8:
        raise TypeError(f"expected images of dtype torch.uint8, found {images.dtype}")
    if images.dim() != 4 or images.shape[2:] != (SIDE, SIDE):
        raise ValueError(
            f"expected images of shape [characters, drawings, {SIDE}, {SIDE}], "
            f"found {list(images.shape)}"
        )


def check_one_shot_runs(path: Path, images: Tensor, support: Tensor, query: Tensor, /) -> None:
    """Say in one sentence why these are not pairs of drawings of the same characters."""
    shapes = [list(member.shape) for member in (support, query)]
    if shapes[0] != shapes[1] or support.dim() != 3 or shapes[0][2] != 2:
        raise ValueError(
            f"expected oneshot_train and oneshot_test in {path} to be of shape [runs, way, 2], "
            f"found {shapes[0]} and {shapes[1]}"
        )
    limits = torch.tensor(images.shape[:2])
    for name, member in (("oneshot_train", support), ("oneshot_test", query)):
        if ((member < 0) | (member >= limits)).any():
            raise ValueError(
                f"expected numbers of characters and drawings below {limits.tolist()} in {name} of "
                f"{path}, found {member.flatten(0, 1).amax(0).tolist()} at most"
            )
    characters = [member[..., 0].sort(1).values for member in (support, query)]
    repeated = (characters[0].diff(dim=1) == 0).any()
    if repeated or not torch.equal(*characters):
        raise ValueError(
            f"expected every run in {path} to have the same different characters in oneshot_train "
            "and oneshot_test, found a run that has not"
        )


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
            except (ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
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


def download_folder(root: Path, /) -> None:
    """Have torchvision fetch what is missing of Omniglot into ``root/omniglot-py``."""
    missing = [part for part in PARTS if not (root / "omniglot-py" / part).is_dir()]
    if not missing:
        return
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            "downloading Omniglot needs torchvision: pip install torchvision"
        ) from error

    for part in missing:
        try:
            datasets.Omniglot(root, background=part == "images_background", download=True)
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
    images = torch.stack(
        [torch.stack([read_drawing(path) for path in paths]) for paths in drawings]
    )
    splits = [SPLITS.index(folder_split(path, split_scheme)) for path in characters]
    return Characters(images, torch.tensor(splits))


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
