"""mini-ImageNet classification: every task tells a few classes of photographs apart."""

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from gradagree_opt.annotations import Int
from gradagree_opt.tasks.draws import in_random_order, random_subsets
from gradagree_opt.tasks.mini_imagenet_files import Images, cache_folders, read_splits
from gradagree_opt.tasks.protocol import Batch, Split, check_options, check_sample_arguments


class MiniImageNet:
    """N-way, K-shot classification of 84×84 colour images, from class folders and split lists.

    A task is ``way`` different classes of one split, numbered at random, with ``shot`` images of
    each to learn from and ``query_shots`` others to be tested on, in random order. Images are
    ``[3, 84, 84]`` in [0, 1]. The folder looks like this, the lists being those of Ravi and
    Larochelle, with a line for each image and the columns filename and label::

        train.csv  val.csv  test.csv                     # 64, 16 and 20 classes
        n01532829/n0153282900000005.jpg                  # label/filename

    All images are decoded once, which takes minutes, into one array for each split (1.3 GB in
    total), and from then on mapped into memory: tasks read what they need, and processes share it.
    A changed list makes a new array; delete the arrays where images were replaced.

    Args:
        root: the folder.
        way: classes per task.
        shot: support images per class.
        query_shots: query images per class.
        cache: folder for the arrays; where absent, ``root / "cache"``, or, where that cannot be
            written to, one for this ``root`` in ``gradagree-opt`` of the user's cache folder,
            ``$XDG_CACHE_HOME`` or ``~/.cache``.
        dtype: of the sampled images.

    Raises:
        FileNotFoundError: a split list, the folder of a class or an image is not there.
        TypeError: ``dtype`` is not a floating one.
        OSError: the folder for the arrays cannot be written to.
        ValueError: a list is not one, an image is in it twice, two lists share a class, an image is
            damaged, a count is below 1, ``way`` is larger than a split, or a class has fewer than
            ``shot + query_shots`` images.

    Source: Vinyals et al. 2016 (data); Ravi and Larochelle 2017 (splits); Finn et al. 2017 (84×84).
    """

    def __init__(
        self,
        root: str | PathLike[str],
        /,
        *,
        way: int = 5,
        shot: int = 1,
        query_shots: int = 15,
        cache: str | PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_options(dtype, way=way, shot=shot, query_shots=query_shots)
        self.way, self.shot, self.query_shots, self.dtype = way, shot, query_shots, dtype
        folder = Path(root)
        caches = cache_folders(folder) if cache is None else [Path(cache)]
        self.images = read_splits(folder, caches)
        """For each split its images, uint8."""
        for split, images in self.images.items():
            check_enough(split, images, way, shot, query_shots)

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        """Draw tasks.

        Args:
            n_tasks: number of tasks.
            split: no class of one split is ever in a task of another.
            generator: a seeded generator; the tensors are on the CPU.

        Returns:
            ``{"support": (x, y), "query": (x, y)}``: x ``[n_tasks, way * shots, 3, 84, 84]`` in
            [0, 1], y int64 ``[n_tasks, way * shots]`` in 0 … way - 1.

        Raises:
            TypeError: ``n_tasks`` is not an integer or ``generator`` not a ``torch.Generator``.
            ValueError: ``n_tasks`` is below 1 or ``split`` is unknown.
        """
        check_sample_arguments(n_tasks, split, generator)
        pixels, classes = self.images[split]
        chosen = random_subsets((n_tasks,), len(classes), self.way, generator).cpu()
        candidates = classes[chosen]
        drawn = random_subsets(
            (n_tasks, self.way),
            classes.shape[1],
            self.shot + self.query_shots,
            generator,
            allowed=candidates >= 0,
        )
        rows = candidates.gather(2, drawn.cpu())
        return {
            "support": self._batch(pixels, rows[:, :, : self.shot], generator),
            "query": self._batch(pixels, rows[:, :, self.shot :], generator),
        }

    def _batch(
        self, pixels: Tensor, rows: Int[Tensor, "n way shots"], generator: torch.Generator
    ) -> Batch:
        mixed, labels = in_random_order(rows, generator)
        return pixels[mixed].to(self.dtype).div_(255), labels


def check_enough(split: str, images: Images, way: int, shot: int, query_shots: int, /) -> None:
    """Say in one sentence why no task can be drawn from these images."""
    classes = images.classes
    if len(classes) < way:
        raise ValueError(
            f"expected way to be at most the {len(classes)} classes of split {split!r}, found {way}"
        )
    smallest = int((classes >= 0).sum(1).min())
    if smallest < shot + query_shots:
        raise ValueError(
            f"expected shot + query_shots to be at most the {smallest} images of the smallest "
            f"class of split {split!r}, found {shot} + {query_shots}"
        )
