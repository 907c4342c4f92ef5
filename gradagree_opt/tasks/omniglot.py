"""Omniglot classification: every task tells a few handwritten characters apart."""

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from gradagree_opt.annotations import Int
from gradagree_opt.tasks.draws import in_random_order, random_subsets
from gradagree_opt.tasks.omniglot_files import (
    SplitScheme,
    check_images,
    read_folder,
    read_npz,
)
from gradagree_opt.tasks.one_shot_runs import read_one_shot_archive, read_one_shot_folder
from gradagree_opt.tasks.protocol import (
    SPLITS,
    Batch,
    Split,
    check_options,
    check_sample_arguments,
    check_split_numbers,
)


class Omniglot:
    """N-way, K-shot classification of handwritten characters, 20 drawings of each.

    A task is ``way`` different characters of one split, numbered at random, with ``shot`` drawings
    of each to learn from and ``query_shots`` others to be tested on. Examples come in random order,
    so consecutive sub-batches of a support set mix the classes. Images are ``[1, 28, 28]`` in
    [0, 1] with ink 1 on paper 0, the inverted convention of Finn et al. 2017.

    Usually made by :meth:`from_npz` or :meth:`from_torchvision`. They know three ways to split:

    - ``"vinyals"``: 1028 characters to train, 172 to validate, 423 to test; what the field uses.
    - ``"background"``: 964 characters to train and 659 of other alphabets to test, the harder
      original of Lake et al.; it has nothing to validate on.
    - ``"background_validation"``: of those 964 the 172 of Armenian, Bengali, Early Aramaic, Hebrew
      and Georgian, the alphabets that validate in ``"vinyals"``, to validate and 792 to train.

    Args:
        images: uint8 ``[characters, drawings, 28, 28]``, ink 255.
        splits: ``[characters]``, for each 0 (train), 1 (validation) or 2 (test).
        way: classes per task.
        shot: support drawings per class.
        query_shots: query drawings per class.
        rotations: every character turned by 90°, 180° and 270° is three more classes of its split,
            in all splits; takes four times the memory (102 MB instead of 25 MB).
        dtype: of the sampled images.
        device: where the images are kept, as uint8, and where tasks come out.

    Raises:
        TypeError: ``images`` is not uint8 or ``dtype`` not a floating one.
        ValueError: shapes are not those above, a split number is unknown, a count is below 1,
            ``way`` is larger than a split, or ``shot + query_shots`` is more than the drawings of a
            character.

    Source: Lake et al. 2015 (data, background split); Vinyals et al. 2016 (protocol, rotations);
    Finn et al. 2017 (28×28 images, ink 1).

    >>> images = torch.zeros(30, 20, 28, 28, dtype=torch.uint8)
    >>> omniglot = Omniglot(images, torch.arange(30) % 3, way=5, shot=1, query_shots=15)
    >>> tasks = omniglot.sample(4, split="test", generator=torch.Generator().manual_seed(0))
    >>> [x.shape for x in tasks["support"]]
    [torch.Size([4, 5, 1, 28, 28]), torch.Size([4, 5])]
    >>> [x.shape for x in tasks["query"]]
    [torch.Size([4, 75, 1, 28, 28]), torch.Size([4, 75])]
    """

    def __init__(
        self,
        images: Tensor,
        splits: Tensor,
        /,
        *,
        way: int = 5,
        shot: int = 1,
        query_shots: int = 15,
        rotations: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_characters(images, splits)
        check_options(dtype, way=way, shot=shot, query_shots=query_shots)
        if shot + query_shots > images.shape[1]:
            raise ValueError(
                f"expected shot + query_shots to be at most the {images.shape[1]} drawings of a "
                f"character, found {shot} + {query_shots}"
            )
        if rotations:
            images = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
            splits = splits.repeat(4)
        self.way, self.shot, self.query_shots = way, shot, query_shots
        self.dtype, self.device = dtype, torch.device(device)
        self.drawings = images.shape[1]
        self.images = images.to(device).flatten(0, 1).unsqueeze(1)
        """uint8 ``[classes * drawings, 1, 28, 28]``, the drawings of a class one after another."""
        self.classes: dict[str, Int[Tensor, " classes"]] = {
            name: (splits == number).nonzero().squeeze(1).to(device)
            for number, name in enumerate(SPLITS)
        }
        """For each split the classes in it."""
        for name, classes in self.classes.items():
            if 0 < len(classes) < way:
                raise ValueError(
                    f"expected way to be at most the {len(classes)} classes of split {name!r}, "
                    f"found {way}"
                )

    @classmethod
    def from_npz(
        cls,
        path: str | PathLike[str],
        /,
        *,
        way: int = 5,
        shot: int = 1,
        query_shots: int = 15,
        split_scheme: SplitScheme = "vinyals",
        rotations: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Omniglot":
        """Omniglot from an .npz archive. Needs NumPy; pickled objects are refused.

        Args:
            path: archive with ``images`` (uint8 ``[characters, drawings, 28, 28]``, ink 255) and,
                as the scheme needs, ``vinyals_split`` (0, 1 or 2 for each character),
                ``background`` (whether it is to train on) or both.
            split_scheme: one of the three above.
            way, shot, query_shots, rotations, dtype, device: those of the class.

        Raises:
            FileNotFoundError: there is no file at ``path``.
            ValueError: it is no .npz archive, or a member is missing, damaged, a pickled object or
                not what is described above; and whatever the class raises.
        """
        characters = read_npz(Path(path), split_scheme)
        return cls(
            *characters,
            way=way,
            shot=shot,
            query_shots=query_shots,
            rotations=rotations,
            dtype=dtype,
            device=device,
        )

    @classmethod
    def from_torchvision(
        cls,
        root: str | PathLike[str],
        /,
        *,
        download: bool = False,
        way: int = 5,
        shot: int = 1,
        query_shots: int = 15,
        split_scheme: SplitScheme = "vinyals",
        rotations: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Omniglot":
        """Omniglot from the folder that ``torchvision.datasets.Omniglot(root)`` fills.

        All drawings are read and resized once, which takes some seconds. Needs Pillow, and
        torchvision where something is fetched. Characters come in another order than in an .npz
        archive, so that one seed gives other tasks.

        Args:
            root: folder with ``omniglot-py``, in which are ``images_background`` and
                ``images_evaluation``.
            download: let torchvision fetch what is not there, about 16 MB.
            split_scheme: one of the three above.
            way, shot, query_shots, rotations, dtype, device: those of the class.

        Raises:
            FileNotFoundError: one of the two folders is not there, or cannot be fetched.
            ValueError: characters differ in their number of drawings; and whatever the class
                raises.
        """
        characters = read_folder(Path(root), split_scheme, download=download)
        return cls(
            *characters,
            way=way,
            shot=shot,
            query_shots=query_shots,
            rotations=rotations,
            dtype=dtype,
            device=device,
        )

    @staticmethod
    def one_shot_runs(
        path: str | PathLike[str], /, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, Batch]:
        """The 20 official one-shot runs, the benchmark that ``"background"`` trains for.

        Each is a 20-way 1-shot task within one of the alphabets to test on: one drawing of each
        character to learn from, one by another person to classify. There is nothing random in it.

        Args:
            path: folder with ``run01`` to ``run20``, the unpacked ``all_runs.zip`` of Lake et al.;
                or an archive with ``images`` as in :meth:`from_npz`, and ``oneshot_train`` and
                ``oneshot_test``, ``[runs, way, 2]``: numbers of the character and of the drawing.
                The characters of a run may come in different orders in the two.
            dtype: of the images.

        Returns:
            ``{"support": (x, y), "query": (x, y)}``: x ``[20, 20, 1, 28, 28]`` in [0, 1], y int64
            ``[20, 20]`` in 0 … 19, equal for the two drawings of a character.

        Raises:
            FileNotFoundError: there is no file at ``path``, or there are no runs in the folder.
            TypeError: ``dtype`` is not a floating one, or ``images`` is not uint8.
            ValueError: it is no .npz archive, or a member, list or drawing is missing, damaged, a
                pickled object or not what is described above.

        Source: Lake et al. 2015; https://github.com/brendenlake/omniglot for the runs.
        """
        check_options(dtype)
        read = read_one_shot_folder if Path(path).is_dir() else read_one_shot_archive
        support, query = read(Path(path))
        return {
            part: (examples.images.unsqueeze(2).to(dtype).div_(255), examples.classes)
            for part, examples in (("support", support), ("query", query))
        }

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        """Draw tasks.

        Args:
            n_tasks: number of tasks.
            split: no character of one split is ever in a task of another.
            generator: a seeded generator, on any device: which tasks are drawn depends on it alone,
                and they come out on the device of the images.

        Returns:
            ``{"support": (x, y), "query": (x, y)}``: x ``[n_tasks, way * shots, 1, 28, 28]`` in
            [0, 1], y int64 ``[n_tasks, way * shots]`` in 0 … way - 1.

        Raises:
            TypeError: ``n_tasks`` is not an integer or ``generator`` not a ``torch.Generator``.
            ValueError: ``n_tasks`` is below 1, or ``split`` is unknown or has no characters.
        """
        check_sample_arguments(n_tasks, split, generator)
        classes = self.classes[split]
        if len(classes) == 0:
            raise ValueError(
                f"expected a split with characters, found none in {split!r}: "
                "the background scheme has nothing to validate on"
            )
        chosen = random_subsets((n_tasks,), len(classes), self.way, generator)
        drawings = random_subsets(
            (n_tasks, self.way), self.drawings, self.shot + self.query_shots, generator
        )
        rows = classes[chosen.to(self.device)].unsqueeze(2) * self.drawings + drawings.to(
            self.device
        )
        return {
            "support": self._shuffled(rows[:, :, : self.shot], generator),
            "query": self._shuffled(rows[:, :, self.shot :], generator),
        }

    def _shuffled(self, rows: Int[Tensor, "n way shots"], generator: torch.Generator) -> Batch:
        mixed, labels = in_random_order(rows, generator)
        return self.images[mixed].to(self.dtype).div_(255), labels


def check_characters(images: Tensor, splits: Tensor, /) -> None:
    """Say in one sentence why these are not characters with their splits."""
    check_images(images)
    if splits.shape != images.shape[:1]:
        raise ValueError(
            f"expected one split number for each of the {len(images)} characters, "
            f"found shape {list(splits.shape)}"
        )
    check_split_numbers(splits)
