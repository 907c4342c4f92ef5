"""Drawings of characters: Omniglot."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from gradagree_opt.ablation.kinds.kind import Kind
from gradagree_opt.ablation.kinds.measures import ACCURACY, Measure
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.sections import DRAWING, Test
from gradagree_opt.tasks import Omniglot
from gradagree_opt.tasks.omniglot_files import SplitScheme, read_folder, read_npz


class OmniglotTasks(Kind):
    """Omniglot; the split ``background`` is the ``background_validation`` of the distribution."""

    kind: Literal["omniglot"]
    split: Literal["vinyals", "background"] = "vinyals"
    rotations: bool = False
    way: Annotated[int, Field(ge=2)] = 5
    support_shots: PositiveInt
    query_shots: PositiveInt = 1

    @property
    def measure(self) -> Measure:
        return ACCURACY

    @property
    def input_size(self) -> int:
        return DRAWING

    @property
    def citation(self) -> str:
        rotated = (
            "rotations by 90, 180 and 270 degrees being classes of their own "
            "[@vinyals2016matching], "
        )
        split = (
            "trained on its background alphabets but for the five that validate in "
            "[@vinyals2016matching], tested on those of its evaluation set,"
            if self.split == "background"
            else "the characters split as in [@vinyals2016matching],"
        )
        named = f"on {self.way}-way classification of Omniglot [@lake2015human], "
        return named + rotated * self.rotations + split

    def build(self, test: Test, data: Path | None) -> tuple[Omniglot, Omniglot]:
        if data is None:
            raise StudyError(
                "this study needs --data: an Omniglot .npz file, or a folder that torchvision fills"
            )
        if not data.exists():
            raise StudyError(
                f"--data {data}: found nothing there; give an Omniglot .npz file, or make the "
                "folder that torchvision is to fill"
            )
        scheme: SplitScheme = "vinyals" if self.split == "vinyals" else "background_validation"
        try:
            read = partial(read_folder, download=True) if data.is_dir() else read_npz
            characters = read(data, scheme)
            tasks_with = partial(Omniglot, *characters, way=self.way, rotations=self.rotations)
            return (
                tasks_with(shot=self.support_shots, query_shots=self.query_shots),
                tasks_with(shot=test.support_shots, query_shots=test.query_shots),
            )
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise StudyError(f"--data {data}: {error}") from None

    def data(self, distribution: Omniglot) -> list[Tensor]:
        return [distribution.images, *distribution.classes.values()]
