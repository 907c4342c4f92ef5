"""Sines of random amplitude and phase."""

import math
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor

from gradagree_opt.ablation.kinds.kind import Kind, refuse_data
from gradagree_opt.ablation.kinds.measures import ERROR, Measure
from gradagree_opt.ablation.study.sections import Test
from gradagree_opt.tasks import Sine

PHASES = {"paper": 2 * math.pi, "finn": math.pi}


class SineTasks(Kind):
    kind: Literal["sine"]
    ranges: Literal["paper", "finn"] = "paper"
    support: Literal["uniform", "shuffled_grid"] = "uniform"
    support_shots: PositiveInt
    query_shots: PositiveInt = 1
    on_grid: ClassVar[bool] = True

    @property
    def measure(self) -> Measure:
        return ERROR

    @property
    def input_size(self) -> int:
        return 1

    @property
    def citation(self) -> str:
        if self.ranges == "finn":
            return "on sine regression as in [@finn2017model],"
        return "on sine regression with the amplitudes and phases of [@eshratifar2018gradient],"

    def build(self, test: Test, data: Path | None) -> tuple[Sine, Sine]:
        refuse_data(self.kind, data, "made up")
        phase = (0.0, PHASES[self.ranges])
        return (
            Sine(
                phase=phase,
                support=self.support,
                support_shots=self.support_shots,
                query_shots=self.query_shots,
            ),
            Sine(
                phase=phase,
                support_shots=test.support_shots,
                query="grid",
                query_shots=test.query_shots,
            ),
        )

    def data(self, distribution: Sine) -> list[Tensor]:  # noqa: ARG002 - made up
        return []
