"""Tasks of the user's own, for regression or classes, from what the study names."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from gradagree_opt.ablation import own
from gradagree_opt.ablation.kinds.kind import Kind, draw_tasks
from gradagree_opt.ablation.kinds.measures import ACCURACY, ERROR, Measure
from gradagree_opt.ablation.section import LocatedError, Options, Reference, StudyError
from gradagree_opt.ablation.study.sections import Test
from gradagree_opt.tasks import TaskDistribution
from gradagree_opt.tasks.protocol import SPLITS


class OwnTasks(Kind):
    """A distribution of the user's own: see :class:`gradagree_opt.tasks.TaskDistribution`.

    ``make`` names, as ``module:name``, what is called with ``support_shots``, ``query_shots``,
    ``root`` (the --data, where there is some) and the ``options``: for the training, and with the
    shots of the test.

    Attributes:
        inputs: Numbers in one example.
        outputs: Numbers in the target of one example, in regression.
        way: Classes of a task, of each of which there are so many shots; None for regression.
    """

    drawn_alone: ClassVar[bool] = True
    kind: Literal["own"]
    make: Reference
    options: Options = Field(default_factory=dict)
    inputs: PositiveInt = 1
    outputs: PositiveInt = 1
    way: Annotated[int, Field(ge=2)] | None = None
    support_shots: PositiveInt
    query_shots: PositiveInt = 1

    @model_validator(mode="after")
    def of_one_kind(self) -> "OwnTasks":
        if self.way is not None and self.outputs != 1:
            message = f"expected outputs without way, found both; classes have {self.way} outputs"
            raise LocatedError(message, "outputs")
        return self

    @property
    def measure(self) -> Measure:
        return ERROR if self.way is None else ACCURACY

    @property
    def input_size(self) -> int:
        return self.inputs

    @property
    def citation(self) -> str:
        options = "".join(f", {name} = {value}" for name, value in self.options.items())
        kind = "" if self.way is None else f"{self.way}-way classification of "
        return f"on {kind}tasks of our own ({self.make}{options}),"

    def build(self, test: Test, data: Path | None) -> tuple[TaskDistribution, TaskDistribution]:
        try:
            return (
                self.call(data, self.support_shots, self.query_shots),
                self.call(data, test.support_shots, test.query_shots),
            )
        except ValueError as error:
            lacks = data is None and "argument: 'root'" in str(error)
            cure = "; give --data, the path that root is to be" if lacks else ""
            raise StudyError(f"the tasks of {self.make}: {error}{cure}") from None

    def call(self, data: Path | None, support_shots: int, query_shots: int) -> TaskDistribution:
        """Tasks of so many shots, by what the study names."""
        root = {} if data is None else {"root": str(data)}
        shots = {"support_shots": support_shots, "query_shots": query_shots}
        made = own.call(self.make, **shots, **root, **self.options)
        if not isinstance(made, TaskDistribution):
            raise ValueError(
                f"expected an object with sample(n_tasks, split=, generator=), found {made!r}"
            )
        return made

    def data(self, distribution: TaskDistribution) -> list[Tensor]:
        return draw_tasks(distribution, SPLITS)
