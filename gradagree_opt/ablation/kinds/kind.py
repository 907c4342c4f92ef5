"""What a study asks of its tasks: each kind of them is a section of its file that answers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradagree_opt.ablation.kinds.measures import Measure
from gradagree_opt.ablation.section import Section, StudyError
from gradagree_opt.ablation.study.sections import Network, Test
from gradagree_opt.tasks import TaskDistribution
from gradagree_opt.tasks.protocol import Split

Pair: TypeAlias = tuple[TaskDistribution, TaskDistribution]
"""The tasks of the training, and those of the test protocol."""


class Kind(Section, ABC):
    """A section of tasks, with the shots of the training: those of the test are the study's.

    Attributes:
        multi_task: Whether its tasks are those of the test too, for the form ``multi-task``.
        on_grid: Whether the query inputs of the test are numbers on an even grid.
        channels: Of an image, where a ``conv4`` network can have one; photographs have three.
        images: Whose images those are, for the methods text.
        usual_network: Whose a ``conv4`` network is that does not say.
        packages: Those that have its data.
        drawn_alone: Whether only drawn tasks are seen of its data; what is given as ``--data``, a
            file or a folder, is part of the hash then.
    """

    multi_task: ClassVar[bool] = False
    on_grid: ClassVar[bool] = False
    channels: ClassVar[int] = 1
    images: ClassVar[str] = "Omniglot"
    usual_network: ClassVar[Network] = "nichol"
    packages: ClassVar[tuple[str, ...]] = ()
    drawn_alone: ClassVar[bool] = False

    @property
    @abstractmethod
    def measure(self) -> Measure:
        """How the score of the test is shown."""

    @property
    @abstractmethod
    def input_size(self) -> int:
        """Numbers in one example."""

    @property
    @abstractmethod
    def citation(self) -> str:
        """What the tasks are, for the methods text: "on …,", citations as pandoc reads them."""

    @property
    def unseen(self) -> str:
        """What a task of the test is, below the table."""
        return "unseen tasks"

    @property
    def tested(self) -> str:
        """The same in the methods text."""
        return "unseen tasks"

    @abstractmethod
    def build(self, test: Test, data: Path | None) -> Pair:
        """The tasks of the training, and those of the test protocol.

        Args:
            data: What is given as ``--data``.

        Raises:
            StudyError: The data is absent, not in the expected form, too small, or not wanted; or
                the package that has it is not installed.
        """

    def build_folds(self, test: Test, data: Path | None) -> list[Pair]:
        """The same, once for each fold of a cross-validation; once, where there is none."""
        return [self.build(test, data)]

    @abstractmethod
    def data(self, distribution: Any) -> list[Tensor]:
        """What tasks are drawn from, its parts in a fixed order; nothing, if they are made up.

        Args:
            distribution: One that :meth:`build` gave.
        """


def refuse_data(kind: str, data: Path | None, origin: str) -> None:
    """Raises a StudyError where there is --data for a kind of tasks that has its own."""
    if data is not None:
        raise StudyError(f"{kind} tasks are {origin}: this study takes no --data")


def draw_tasks(distribution: TaskDistribution, splits: Iterable[Split]) -> list[Tensor]:
    """A few tasks of each split, for a distribution of the user's, of which only tasks are seen."""
    drawn = [
        distribution.sample(8, split=split, generator=torch.Generator().manual_seed(0))
        for split in splits
    ]
    return tree_leaves(drawn)
