"""A study: its sections together, and what they have to agree on."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    model_validator,
)

from gradagree_opt.ablation import own
from gradagree_opt.ablation.kinds.digits import DigitsTasks
from gradagree_opt.ablation.kinds.grouped import GroupedTasks
from gradagree_opt.ablation.kinds.learn2learn import Learn2LearnTasks
from gradagree_opt.ablation.kinds.mini_imagenet import MiniImageNetTasks
from gradagree_opt.ablation.kinds.omniglot import OmniglotTasks
from gradagree_opt.ablation.kinds.own import OwnTasks
from gradagree_opt.ablation.kinds.sine import SineTasks
from gradagree_opt.ablation.section import Optimizer, Section, Seeds, unique
from gradagree_opt.ablation.study.consistency import check_study
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.sections import (
    MLP,
    Conv4,
    CorruptionSection,
    Inner,
    MAMLForm,
    MetaSGDForm,
    MultiTaskForm,
    Network,
    Outer,
    OwnModel,
    ReptileForm,
    Test,
    Tuning,
)


def named_device(name: str) -> str:
    """The name, if it is one that a study may give."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"expected the device auto, cpu, cuda or cuda:1, found {name!r}")
    return name


class Study(Section):
    """Everything that defines a study; the fields are explained in ``studies/sine.yaml``.

    Attributes:
        code: SHA-256 of the modules that it names, by their names: filled in where it is run.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: Annotated[str, Field(pattern=r"^[^\r\n]+$")]
    tasks: Annotated[
        SineTasks
        | GroupedTasks
        | OmniglotTasks
        | MiniImageNetTasks
        | Learn2LearnTasks
        | DigitsTasks
        | OwnTasks,
        Field(discriminator="kind"),
    ]
    model: Annotated[MLP | Conv4 | OwnModel, Field(discriminator="kind")]
    form: Annotated[
        ReptileForm | MAMLForm | MetaSGDForm | MultiTaskForm, Field(discriminator="kind")
    ]
    inner: Inner | None = None
    outer: Outer
    corruption: CorruptionSection | None = None
    iterations: Annotated[PositiveInt, Field(le=10**9)]
    meta_batch: Annotated[PositiveInt, Field(le=10**4)]
    compile: Literal["auto", True, False] = "auto"
    device: Annotated[str, AfterValidator(named_device)] = "auto"
    tf32: bool = False
    seeds: Seeds
    tuning: Tuning
    test: Test
    methods: Annotated[list[Method], Field(min_length=1), AfterValidator(unique)]
    baseline: str
    quick: dict[str, Any] | None = None
    code: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def consistent(self) -> "Study":
        check_study(self)
        return self

    def parts(self) -> "list[Study]":
        """The studies that it is made of, one for each fraction of corrupted tasks.

        At 0 that is the study without corruption.
        """
        if self.corruption is None:
            return [self]
        sections = [
            self.corruption.model_copy(update={"fraction": fraction}) if fraction else None
            for fraction in self.corruption.fractions
        ]
        return [self.model_copy(update={"corruption": section}) for section in sections]

    def rates(self, method: Method) -> list[float]:
        """The outer rates that a method is tuned on: its own, or those of all."""
        return method.rates or self.outer.rates

    def optimizer(self, method: Method) -> Optimizer:
        """The outer optimizer that a method is trained with: its own, or that of all."""
        return method.outer or self.outer.optimizer

    @property
    def tuning_seeds(self) -> list[int]:
        """Those that rates are chosen on: the first of the study's, or others."""
        seeds = self.tuning.seeds
        return seeds if isinstance(seeds, list) else self.seeds[:seeds]

    @property
    def fraction(self) -> float:
        """The share of its training tasks that are corrupted, for one of its parts."""
        [fraction] = self.corruption.fractions if self.corruption else [0.0]
        return fraction

    @property
    def flip(self) -> float | None:
        """What a flipped task's displacement is multiplied by; None where no task is flipped."""
        if self.corruption is None or self.corruption.kind != "flipped":
            return None
        assert self.corruption.scale is not None
        return -self.corruption.scale

    @property
    def usual_network(self) -> Network:
        """Whose a conv4 model is that does not say: Nichol's for drawings, else Finn's."""
        return self.tasks.usual_network

    @property
    def way(self) -> int | None:
        """Classes of a task, of each of which there are so many shots; None without such."""
        return getattr(self.tasks, "way", None)

    @property
    def classes(self) -> int | None:
        """Classes that the network tells apart, None for regression."""
        return getattr(self.tasks, "classes", self.way)

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for one example."""
        own: int = getattr(self.tasks, "outputs", 1)
        return self.classes or own

    def references(self, *methods: Method) -> list[str]:
        """What it names of the user's own, as ``module:name``: its tasks, network, and methods."""
        makes = [getattr(section, "make", None) for section in (self.tasks, self.model)]
        named = [make for make in makes if make is not None]
        return named + [name for method in methods for name in method.references]

    def with_code(self) -> "Study":
        """The study with the hashes of the modules that it names, as they are now.

        Raises:
            StudyError: A module is not found.
        """
        return self.model_copy(update={"code": own.digests(self.references(*self.methods))})

    def code_of(self, method: Method) -> dict[str, str]:
        """Those of the hashes that a run of the method is filed under."""
        modules = {own.module_of(name) for name in self.references(method)}
        return {name: digest for name, digest in self.code.items() if name in modules}

    @property
    def adapts(self) -> bool:
        """Whether it is meta-learning: tasks are new, and adapted to from their support sets."""
        return not isinstance(self.form, MultiTaskForm)
