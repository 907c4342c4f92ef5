"""Jobs that are not a study's, where processes of their own can import them."""

from gradagree_opt.ablation.runs.processes import Report
from gradagree_opt.ablation.section import StudyError


class Failing:
    """A job that cannot be prepared."""

    def prepare(self) -> None:
        raise StudyError("the data are gone")

    def perform(self, context: None, task: int, report: Report, /) -> int:
        return task
