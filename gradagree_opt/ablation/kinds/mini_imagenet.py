"""Photographs of a hundred classes: mini-ImageNet."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from gradagree_opt.ablation.kinds.kind import Kind
from gradagree_opt.ablation.kinds.measures import ACCURACY, Measure
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.sections import Network, Test
from gradagree_opt.tasks import MiniImageNet

PHOTOGRAPH = 3 * 84 * 84


class MiniImageNetTasks(Kind):
    kind: Literal["mini-imagenet"]
    way: Annotated[int, Field(ge=2)] = 5
    support_shots: PositiveInt
    query_shots: PositiveInt = 1
    channels: ClassVar[int] = 3
    images: ClassVar[str] = "mini-ImageNet"
    usual_network: ClassVar[Network] = "finn"

    @property
    def measure(self) -> Measure:
        return ACCURACY

    @property
    def input_size(self) -> int:
        return PHOTOGRAPH

    @property
    def citation(self) -> str:
        return (
            f"on {self.way}-way classification of mini-ImageNet [@vinyals2016matching], the "
            "classes split as in [@ravi2017optimization],"
        )

    def build(self, test: Test, data: Path | None) -> tuple[MiniImageNet, MiniImageNet]:
        if data is None:
            raise StudyError(
                "this study needs --data: a folder of mini-ImageNet's classes with the split lists "
                "train.csv, val.csv and test.csv"
            )
        try:
            training, evaluation = (
                MiniImageNet(
                    data, way=self.way, shot=shots.support_shots, query_shots=shots.query_shots
                )
                for shots in (self, test)
            )
        except (ImportError, OSError, ValueError) as error:
            raise StudyError(f"--data {data}: {error}") from None
        return training, evaluation

    def data(self, distribution: MiniImageNet) -> list[Tensor]:
        return [tensor for images in distribution.images.values() for tensor in images]
