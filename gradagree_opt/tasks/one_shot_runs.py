"""Reads the official one-shot runs of Omniglot, from an archive or as Lake et al. give them."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gradagree_opt.tasks.omniglot_files import check_images, read_drawings, read_members


class Examples(NamedTuple):
    """One drawing of each class of the official one-shot runs."""

    images: Tensor
    """uint8 ``[runs, way, 28, 28]``, ink 255 on paper 0."""
    classes: Tensor
    """int64 ``[runs, way]``, 0 … way - 1 in each run."""


def read_one_shot_archive(path: Path, /) -> tuple[Examples, Examples]:
    """Support and query examples of an archive with ``oneshot_train`` and ``oneshot_test``.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        TypeError: ``images`` is not uint8.
        ValueError: it is no .npz archive, or a member is missing, damaged, a pickled object (which
            is never loaded) or not what :meth:`Omniglot.one_shot_runs` describes.
    """
    images, support, query = read_members(path, ("images", "oneshot_train", "oneshot_test"))
    check_images(images)
    check_one_shot_runs(path, images, support, query)
    # [runs, way, 1] against [runs, 1, way]: the place of each query's character in the support set
    same = query[..., :1] == support[..., 0].unsqueeze(1)
    places = torch.arange(support.shape[1]).expand(support.shape[:2])
    return (
        Examples(images[support[..., 0], support[..., 1]], places.clone()),
        Examples(images[query[..., 0], query[..., 1]], same.int().argmax(2)),
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


def read_one_shot_folder(folder: Path, /) -> tuple[Examples, Examples]:
    """Support and query examples of the unpacked ``all_runs.zip`` of Lake et al., resized to 28×28.

    Every run is a folder; its ``class_labels.txt`` has a line for each drawing to classify, in
    which the drawing to learn from of the same character comes second.

    Raises:
        FileNotFoundError: there are no runs in the folder.
        ValueError: a list is not one, a drawing is missing or damaged, or the runs differ in the
            number of their characters.
    """
    lists = sorted(folder.glob("run*/class_labels.txt"))
    if not lists:
        raise FileNotFoundError(
            f"expected run01/class_labels.txt and so on, of Lake et al.'s all_runs.zip, in "
            f"{folder}, found none"
        )
    runs = [read_pairs(path) for path in lists]
    ways = {len(pairs) for pairs in runs}
    if len(ways) > 1:
        raise ValueError(
            f"expected runs of one number of characters in {folder}, found {sorted(ways)}"
        )
    support = [sorted(learnt for _, learnt in pairs) for pairs in runs]
    query = [[asked for asked, _ in pairs] for pairs in runs]
    classes = [
        [names.index(learnt) for _, learnt in pairs]
        for names, pairs in zip(support, runs, strict=True)
    ]
    return (
        Examples(drawings_in(folder, support), torch.arange(*ways).repeat(len(runs), 1)),
        Examples(drawings_in(folder, query), torch.tensor(classes)),
    )


def drawings_in(folder: Path, names: list[list[str]], /) -> Tensor:
    return read_drawings([[folder / name for name in row] for row in names])


def read_pairs(path: Path, /) -> list[tuple[str, str]]:
    """The drawing to classify and that to learn from, of each line of a ``class_labels.txt``."""
    lines = path.read_text("utf-8", "replace").splitlines()
    pairs = [(words[0], words[-1]) for line in lines if len(words := line.split()) == 2]
    drawings = {name for pair in pairs for name in pair}
    if not lines or len(drawings) < 2 * len(lines):
        raise ValueError(
            f"expected in every line of {path} a drawing to classify and one of the same character "
            "to learn from, each named once, found lines that have not"
        )
    return pairs
