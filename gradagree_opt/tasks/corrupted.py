"""Tasks of which some are spoilt in training, to see which aggregator is misled by them."""

from typing import Literal, get_args

import torch
from torch import Tensor

from gradagree_opt.annotations import Bool
from gradagree_opt.options import check_choice
from gradagree_opt.tasks.draws import random_subsets
from gradagree_opt.tasks.protocol import Batch, Split, TaskDistribution, check_sample_arguments

Corruption = Literal["shuffled_labels", "label_noise", "outlier_scale", "foreign"]
PARTS = ("support", "query")


class Corrupted:
    """A distribution whose training tasks are spoilt, each with the same probability.

    Which tasks are spoilt is drawn from the generator, and a spoilt one is so as a whole, in its
    support and its query set. Validation and test tasks are those of ``base``, from the same draws.

    - ``"shuffled_labels"``: the targets of a set are permuted among its examples, so that they tell
      nothing of the inputs; the target of a single example stays.
    - ``"label_noise"``: Gaussian noise of standard deviation ``scale`` is added to the targets;
      those that are numbers of classes are refused.
    - ``"outlier_scale"``: targets are multiplied by ``scale``; where targets are numbers of
      classes, inputs are, which a network with BatchNorm divides out again.
    - ``"foreign"``: the task is one of ``foreign`` instead, which has to make tensors of the same
      shapes and dtypes.

    Args:
        base: the distribution.
        kind: one of the above.
        fraction: probability of a training task to be spoilt, above 0 and at most 1.
        scale: the factor of ``"outlier_scale"`` or the deviation of ``"label_noise"``; it has no
            effect otherwise.
        foreign: the other distribution of ``"foreign"``, and None otherwise.

    Raises:
        ValueError: ``kind`` is unknown, ``fraction`` is not in (0, 1], ``scale`` is not finite, or
            not above 0 for ``"label_noise"``, or ``foreign`` is given for another kind or not for
            its own.

    >>> from gradagree_opt.tasks import Sine
    >>> spoilt = Corrupted(Sine(amplitude=(1.0, 1.0)), kind="outlier_scale", fraction=0.5)
    >>> tasks = spoilt.sample(100, generator=torch.Generator().manual_seed(0))
    >>> 30 < (tasks["query"][1].abs().amax((1, 2)) > 1).sum() < 70
    tensor(True)
    """

    def __init__(
        self,
        base: TaskDistribution,
        /,
        *,
        kind: Corruption,
        fraction: float,
        scale: float = 10.0,
        foreign: TaskDistribution | None = None,
    ) -> None:
        check_choice("kind", kind, get_args(Corruption))
        if not 0 < fraction <= 1:
            raise ValueError(f"expected fraction to be above 0 and at most 1, found {fraction!r}")
        if not abs(scale) < float("inf"):
            raise ValueError(f"expected scale to be finite, found {scale!r}")
        if kind == "label_noise" and scale <= 0:
            raise ValueError(f"expected scale, a deviation, to be above 0, found {scale!r}")
        if (foreign is not None) != (kind == "foreign"):
            raise ValueError(
                "expected another distribution in foreign for kind='foreign' and None for the "
                f"others, found {foreign!r} for {kind!r}"
            )
        self.base, self.kind, self.fraction = base, kind, fraction
        self.scale, self.foreign = scale, foreign

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        """Draw tasks; those of ``"train"`` go through the corruption.

        Returns:
            ``{"support": (x, y), "query": (x, y)}`` of the shapes that ``base`` gives.

        Raises:
            TypeError: ``n_tasks`` is not an integer or ``generator`` not a ``torch.Generator``.
            ValueError: whatever ``base`` or ``foreign`` raises, or their tensors differ in shape or
                dtype, or targets that noise is to be added to are classes.
        """
        check_sample_arguments(n_tasks, split, generator)
        tasks = self.base.sample(n_tasks, split=split, generator=generator)
        if split != "train":
            return tasks
        draws = torch.rand(n_tasks, generator=generator, device=generator.device)
        spoilt = draws < self.fraction
        others = self._others(tasks, generator)
        return {part: chosen(spoilt, others[part], tasks[part]) for part in PARTS}

    def _others(self, tasks: dict[str, Batch], generator: torch.Generator) -> dict[str, Batch]:
        """For every task what stands in its place where it is spoilt."""
        if self.kind == "shuffled_labels":
            return {part: shuffled(tasks[part], generator) for part in PARTS}
        if self.kind == "label_noise":
            return {part: noisy(tasks[part], self.scale, generator) for part in PARTS}
        if self.kind == "outlier_scale":
            return {part: scaled(tasks[part], self.scale) for part in PARTS}
        assert self.foreign is not None
        n_tasks = len(tasks["support"][0])
        foreign = self.foreign.sample(n_tasks, split="train", generator=generator)
        for part in PARTS:
            for theirs, ours in zip(foreign[part], tasks[part], strict=True):
                check_alike(part, theirs, ours)
        return foreign


def chosen(spoilt: Bool[Tensor, " n"], others: Batch, tasks: Batch, /) -> Batch:
    """The other tasks where spoilt, the tasks themselves elsewhere."""
    (other_x, other_y), (x, y) = others, tasks
    rows = spoilt.to(x.device)
    return (
        torch.where(rows.view(-1, *[1] * (x.dim() - 1)), other_x, x),
        torch.where(rows.view(-1, *[1] * (y.dim() - 1)), other_y, y),
    )


def shuffled(batch: Batch, generator: torch.Generator, /) -> Batch:
    """The targets of each task permuted among its examples."""
    x, y = batch
    examples = y.shape[1]
    order = random_subsets((len(y),), examples, examples, generator).to(y.device)
    return x, y[torch.arange(len(y), device=y.device).unsqueeze(1), order]


def noisy(batch: Batch, deviation: float, generator: torch.Generator, /) -> Batch:
    """Targets with Gaussian noise of their own, one draw for each number."""
    x, y = batch
    if not y.is_floating_point():
        raise ValueError(
            f"expected targets that are numbers for kind='label_noise', found {y.dtype}: take "
            "'shuffled_labels' for classes"
        )
    noise = torch.randn(y.shape, generator=generator, device=generator.device, dtype=y.dtype)
    return x, y + deviation * noise.to(y.device)


def scaled(batch: Batch, scale: float, /) -> Batch:
    """Targets times the scale, or inputs where the targets are numbers of classes."""
    x, y = batch
    return (x, y * scale) if y.is_floating_point() else (x * scale, y)


def check_alike(part: str, theirs: Tensor, ours: Tensor, /) -> None:
    if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
        raise ValueError(
            f"expected foreign tasks with {part} tensors of shape {list(ours.shape)} and "
            f"{ours.dtype}, found {list(theirs.shape)} and {theirs.dtype}"
        )
