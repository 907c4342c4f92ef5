"""Pairs of handwritten digits: several questions about one picture, for multi-task learning."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gradagree_opt.annotations import Float, Int
from gradagree_opt.frameworks import require
from gradagree_opt.tasks.group_splits import split_groups
from gradagree_opt.tasks.protocol import SPLITS, Batch, Split, check_options, check_sample_arguments

QUESTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the upper digit": lambda upper, _: upper,
    "the lower digit": lambda _, lower: lower,
    "the larger of the two": torch.maximum,
    "the smaller of the two": torch.minimum,
    "their difference": lambda upper, lower: (upper - lower).abs(),
    "the last digit of their sum": lambda upper, lower: (upper + lower) % CLASSES,
}
"""What each task asks of the two digits of a picture; every answer is a digit."""
CLASSES = 10
SIDE = 8
SHIFT = SIDE // 2
PICTURE = (SIDE + SHIFT) ** 2
"""Numbers in one picture."""


class DigitPairs:
    """Six tasks on the same pictures of two overlaid digits, in the manner of MultiMNIST.

    A picture has two different drawings of one split: the upper one in its top left corner, the
    lower one half a drawing further down and to the right, and the darker of both where they
    overlap. Every task tells ten classes apart: the upper digit, the lower digit, the larger, the
    smaller, their difference, and the last digit of their sum.

    The tasks are the same in every split, and come in this order: task number i of a sample asks
    question i modulo 6, and each six tasks share their pictures.

    Usually made by :meth:`from_scikit_learn`.

    Args:
        drawings: ``[drawings, 8, 8]``, ink as 1 on paper as 0.
        digits: ``[drawings]``, what each is of, 0 … 9.
        splits: ``[drawings]``, for each 0 (train), 1 (validation) or 2 (test).
        support_shots: pictures in the support set of each task.
        query_shots: pictures in its query set.
        dtype: of the sampled pictures.
        device: where the drawings are kept and where tasks come out.

    Raises:
        TypeError: ``dtype`` is not a floating one, or ``digits`` or ``splits`` are no integers.
        ValueError: shapes are not those above, a digit or split number is unknown, a count is below
            1, or a split has fewer than two drawings.

    Source: Sabour et al. 2017 (arXiv:1710.09829), MultiMNIST, and Sener and Koltun 2018
    (arXiv:1810.04650), for the first two tasks.

    >>> drawings, digits = torch.rand(30, 8, 8), torch.arange(30) % 10
    >>> pairs = DigitPairs(drawings, digits, torch.arange(30) % 3, support_shots=4)
    >>> tasks = pairs.sample(6, generator=torch.Generator().manual_seed(0))
    >>> [tensor.shape for tensor in tasks["support"]]
    [torch.Size([6, 4, 1, 12, 12]), torch.Size([6, 4])]
    """

    def __init__(
        self,
        drawings: Tensor,
        digits: Tensor,
        splits: Tensor,
        /,
        *,
        support_shots: int = 1,
        query_shots: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_drawings(drawings, digits, splits)
        check_options(dtype, support_shots=support_shots, query_shots=query_shots)
        self.support_shots, self.query_shots = support_shots, query_shots
        self.device = torch.device(device)
        self.drawings: Float[Tensor, "drawings side side"] = drawings.to(device, dtype)
        self.digits: Int[Tensor, " drawings"] = digits.to(device, torch.int64)
        self.rows: dict[str, Int[Tensor, " rows"]] = {
            name: (splits == number).nonzero().squeeze(1).to(device)
            for number, name in enumerate(SPLITS)
        }
        """For each split the numbers of its drawings."""

    @classmethod
    def from_scikit_learn(
        cls,
        *,
        support_shots: int = 1,
        query_shots: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "DigitPairs":
        """The 1797 digits that scikit-learn ships, of 8×8 pixels. Needs the package scikit-learn.

        A fifth of the drawings is for validation and a fifth for the test; which ones follows from
        their place in the data set, by a hash. All are by the same 13 writers, who are not told
        apart: the test is of new drawings, not of new hands.

        Args:
            support_shots, query_shots, dtype, device: those of the class.

        Raises:
            ImportError: scikit-learn is not installed, or too old; the sentence has the command.

        Source: Alpaydin and Kaynak 1998.
        """
        require("scikit-learn")
        from sklearn.datasets import load_digits

        data = load_digits()
        return cls(
            torch.from_numpy(data.images) / data.images.max(),
            torch.from_numpy(data.target),
            torch.tensor(split_groups(range(len(data.target)))),
            support_shots=support_shots,
            query_shots=query_shots,
            dtype=dtype,
            device=device,
        )

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        """Draw pictures, and ask of them what each task asks.

        Args:
            n_tasks: number of tasks; each six have the same pictures.
            split: no drawing of one split is ever in a picture of another.
            generator: a seeded generator, on any device: which pictures are drawn depends on it
                alone, and they come out on the device of the drawings.

        Returns:
            ``{"support": (x, y), "query": (x, y)}``: x ``[n_tasks, shots, 1, 12, 12]`` and the
            classes y ``[n_tasks, shots]``.

        Raises:
            TypeError: ``n_tasks`` is not an integer or ``generator`` not a ``torch.Generator``.
            ValueError: ``n_tasks`` is below 1, or ``split`` is unknown.
        """
        check_sample_arguments(n_tasks, split, generator)
        return {
            "support": self._ask(n_tasks, self.support_shots, self.rows[split], generator),
            "query": self._ask(n_tasks, self.query_shots, self.rows[split], generator),
        }

    def _ask(self, n_tasks: int, shots: int, rows: Tensor, generator: torch.Generator) -> Batch:
        """The pictures and the answers of the first so many tasks."""
        shape = (math.ceil(n_tasks / len(QUESTIONS)), shots)
        upper, lower = (rows[place.to(self.device)] for place in pairs(len(rows), shape, generator))
        x = overlay(self.drawings[upper], self.drawings[lower]).unsqueeze(2)
        digits = self.digits[upper], self.digits[lower]
        y = torch.stack([answer(*digits) for answer in QUESTIONS.values()], 1)
        return x.repeat_interleave(len(QUESTIONS), 0)[:n_tasks], y.flatten(0, 1)[:n_tasks]


def pairs(n: int, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ordered pairs of different numbers of 0 … n - 1, each as likely as any other."""
    first = torch.randint(n, shape, generator=generator, device=generator.device)
    further = torch.randint(1, n, shape, generator=generator, device=generator.device)
    return first, (first + further) % n


def overlay(
    upper: Float[Tensor, "*batch side side"], lower: Float[Tensor, "*batch side side"]
) -> Float[Tensor, "*batch wide wide"]:
    """The one in the top left corner, the other in the bottom right, the darker where both are.

    >>> overlay(torch.full((8, 8), 0.25), torch.full((8, 8), 0.5))[[0, 5, 11, 0], [0, 5, 11, 11]]
    tensor([0.2500, 0.5000, 0.5000, 0.0000])
    """
    return torch.maximum(
        functional.pad(upper, (0, SHIFT, 0, SHIFT)), functional.pad(lower, (SHIFT, 0, SHIFT, 0))
    )


def check_drawings(drawings: Tensor, digits: Tensor, splits: Tensor, /) -> None:
    """Say in one sentence why these are not drawings with their digits and splits."""
    n = drawings.shape[0]
    if drawings.shape != (n, SIDE, SIDE) or digits.shape != (n,) or splits.shape != (n,):
        raise ValueError(
            f"expected drawings of shape [drawings, {SIDE}, {SIDE}] and digits and splits of shape "
            f"[drawings], found {list(drawings.shape)}, {list(digits.shape)} and "
            f"{list(splits.shape)}"
        )
    for name, numbers, known in (("digits", digits, CLASSES), ("splits", splits, len(SPLITS))):
        if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
            raise TypeError(f"expected {name} to be integers, found {numbers.dtype}")
        unknown = numbers[(numbers < 0) | (numbers >= known)]
        if len(unknown):
            raise ValueError(f"expected {name} of 0 … {known - 1}, found {unknown[0].item()}")
    for number, name in enumerate(SPLITS):
        if (count := int((splits == number).sum())) < 2:
            raise ValueError(
                f"expected two drawings or more in each split, found {count} in {name!r}"
            )
