"""Pairs of handwritten digits, for multi-task learning."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor

from gradagree_opt.ablation.kinds.kind import Kind, refuse_data
from gradagree_opt.ablation.kinds.measures import ACCURACY, Measure
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.sections import Test
from gradagree_opt.tasks import DigitPairs
from gradagree_opt.tasks.digits import CLASSES, PICTURE, QUESTIONS


class DigitsTasks(Kind):
    """Pairs of digits; training has a minibatch of ``support_shots`` pictures for all tasks."""

    kind: Literal["digits"]
    support_shots: PositiveInt
    query_shots: ClassVar[int] = 1
    inputs: ClassVar[int] = PICTURE
    classes: ClassVar[int] = CLASSES
    multi_task: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("scikit-learn",)

    @property
    def measure(self) -> Measure:
        return ACCURACY

    @property
    def input_size(self) -> int:
        return self.inputs

    @property
    def citation(self) -> str:
        *others, last = QUESTIONS
        return (
            "on pairs of the handwritten digits of [@alpaydin1998cascading], overlaid in the "
            f"manner of MultiMNIST [@sabour2017dynamic]: tasks of {self.classes} classes each, to "
            f"tell {', '.join(others)} and {last}, a fifth of the drawings being kept to validate "
            "and a fifth to test, the same for every seed,"
        )

    def build(self, test: Test, data: Path | None) -> tuple[DigitPairs, DigitPairs]:
        refuse_data(self.kind, data, "those of the package scikit-learn")
        try:
            training, evaluation = (
                DigitPairs.from_scikit_learn(
                    support_shots=shots.support_shots, query_shots=shots.query_shots
                )
                for shots in (self, test)
            )
        except ImportError as error:
            raise StudyError(f"the tasks of pairs of digits: {error}") from None
        return training, evaluation

    def data(self, distribution: DigitPairs) -> list[Tensor]:
        return [distribution.drawings, distribution.digits, *distribution.rows.values()]
