"""The tasks of a study that come from learn2learn, by a function of the user's."""

from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from gradagree_opt.ablation import own
from gradagree_opt.ablation.kinds.kind import Kind, draw_tasks
from gradagree_opt.ablation.kinds.measures import ACCURACY, Measure
from gradagree_opt.ablation.section import Reference, StudyError
from gradagree_opt.ablation.study.sections import DRAWING, Test
from gradagree_opt.tasks import TaskDistribution


class Learn2LearnTasks(Kind):
    """Tasksets of learn2learn, made by a function of the user's.

    ``tasksets`` names it as ``module:function``, in a module that Python finds from the current
    folder. It is called as ``learn2learn.vision.benchmarks.get_tasksets`` is: with ``train_ways``,
    ``train_samples``, ``test_ways``, ``test_samples``, ``root`` (the --data, where there is some)
    and the ``options``, and gives the training, validation and test taskset.
    """

    kind: Literal["learn2learn"]
    drawn_alone: ClassVar[bool] = True
    tasksets: Reference
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    inputs: PositiveInt = DRAWING
    way: Annotated[int, Field(ge=2)] = 5
    support_shots: PositiveInt
    query_shots: PositiveInt = 1

    @property
    def measure(self) -> Measure:
        return ACCURACY

    @property
    def input_size(self) -> int:
        return self.inputs

    @property
    def citation(self) -> str:
        return (
            f"on {self.way}-way classification of the tasksets that {self.tasksets} gives "
            "learn2learn [@arnold2020learn2learn],"
        )

    def build(self, test: Test, data: Path | None) -> tuple[TaskDistribution, TaskDistribution]:
        """What the function gives, called as learn2learn's own benchmarks are.

        Python's, NumPy's and PyTorch's global generators are seeded then: a function that shuffles
        its classes gives every process the same.
        """
        try:
            from gradagree_opt.tasks.tasksets import Tasksets, seeded

            with seeded(0):
                parts = self.call(test, data)
            training = Tasksets(*parts, shots=self.support_shots)
            check_apart(training.tasksets)
            return training, Tasksets(*parts, shots=test.support_shots)
        except (ImportError, TypeError, ValueError) as error:
            raise StudyError(f"the tasksets of {self.tasksets}: {error}") from None

    def call(self, test: Test, data: Path | None) -> Any:
        """What the function that the study names returns."""
        root = {} if data is None else {"root": str(data)}
        return own.call(
            self.tasksets,
            train_ways=self.way,
            train_samples=self.support_shots + self.query_shots,
            test_ways=self.way,
            test_samples=test.support_shots + test.query_shots,
            **root,
            **self.options,
        )

    def data(self, distribution: Any) -> list[Tensor]:
        return draw_tasks(distribution, distribution.tasksets)


def check_apart(tasksets: dict[str, Any]) -> None:
    """Say in one sentence that two of learn2learn's tasksets draw from the same classes.

    The omniglot of learn2learn 0.2.0 does: it filters the classes of each, and draws from all.
    """
    for one, other in combinations(tasksets, 2):
        if shared := drawn_classes(tasksets[one]) & drawn_classes(tasksets[other]):
            raise ValueError(
                f"expected {one} and {other} tasks of different classes, found {len(shared)} that "
                "both draw; give NWays, or FusedNWaysKShots, of each its own part of the data"
            )


def drawn_classes(taskset: Any) -> set[tuple[int, Any]]:
    """The classes of a taskset's first choice of classes, each with its data set's identity."""
    from learn2learn.data.transforms import FilterLabels, FusedNWaysKShots, NWays

    for transform in taskset.task_transforms:
        match transform:
            case FilterLabels():
                labels = transform.labels
            case FusedNWaysKShots():
                labels = transform.filter_labels
            case NWays():
                labels = transform.dataset.labels
            case _:
                continue
        return {(id(transform.dataset), label) for label in labels}
    return set()
