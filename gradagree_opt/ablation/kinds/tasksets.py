"""The tasks of a study that come from learn2learn, by a function of the user's."""

from itertools import combinations
from pathlib import Path
from typing import Any

from gradagree_opt.ablation import own
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.sections import Learn2LearnTasks, Test
from gradagree_opt.tasks import TaskDistribution


def tasksets(
    tasks: Learn2LearnTasks, test: Test, data: Path | None
) -> tuple[TaskDistribution, TaskDistribution]:
    """What the function that the study names gives, as learn2learn's own benchmarks do.

    It is called with Python's, NumPy's and PyTorch's global generators seeded: one that shuffles
    its classes gives every process the same.
    """
    try:
        from gradagree_opt.tasks.tasksets import Tasksets, seeded

        with seeded(0):
            parts = call(tasks, test, data)
        training = Tasksets(*parts, shots=tasks.support_shots)
        check_apart(training.tasksets)
        return training, Tasksets(*parts, shots=test.support_shots)
    except (ImportError, TypeError, ValueError) as error:
        raise StudyError(f"the tasksets of {tasks.tasksets}: {error}") from None


def call(tasks: Learn2LearnTasks, test: Test, data: Path | None) -> Any:
    """What the function that the study names returns."""
    root = {} if data is None else {"root": str(data)}
    return own.call(
        tasks.tasksets,
        train_ways=tasks.way,
        train_samples=tasks.support_shots + tasks.query_shots,
        test_ways=tasks.way,
        test_samples=test.support_shots + test.query_shots,
        **root,
        **tasks.options,
    )


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
