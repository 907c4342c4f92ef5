"""A study: its sections together, and what they have to agree on."""

import json
from functools import reduce
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    model_validator,
)

from gradagree_opt.ablation import own
from gradagree_opt.ablation.kinds.own import OwnTasks
from gradagree_opt.ablation.section import LocatedError, Optimizer, Section, Seeds, unique
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.sections import (
    DRAWING,
    MLP,
    Conv4,
    CorruptionSection,
    DigitsTasks,
    GroupedTasks,
    Inner,
    Learn2LearnTasks,
    MAMLForm,
    MetaSGDForm,
    MiniImageNetTasks,
    MultiTaskForm,
    Network,
    OmniglotTasks,
    Outer,
    OwnModel,
    ReptileForm,
    SineTasks,
    Test,
    Tuning,
)
from gradagree_opt.tasks.digits import QUESTIONS


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
    iterations: PositiveInt
    meta_batch: PositiveInt
    compile: Literal["auto", True, False] = "auto"
    seeds: Seeds
    tuning: Tuning
    test: Test
    methods: Annotated[list[Method], Field(min_length=1), AfterValidator(unique)]
    baseline: str
    quick: dict[str, Any] | None = None
    code: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def suited(self) -> "Study":
        """The form goes with the tasks, and has the keys that it needs."""
        if isinstance(self.form, MultiTaskForm) != isinstance(self.tasks, DigitsTasks):
            message = (
                "expected the form multi-task for digits tasks, and for no others, "
                f"found the form {self.form.kind} for {self.tasks.kind} tasks"
            )
            raise LocatedError(message, "form", "kind")
        if not self.adapts:
            return self
        if self.inner is None:
            raise LocatedError("the key 'inner' is missing")
        if "support_shots" not in self.test.model_fields_set:
            raise LocatedError("the key 'support_shots' is missing", "test")
        return self

    @model_validator(mode="after")
    def possible_in_multi_task(self) -> "Study":
        if self.adapts:
            return self
        n = len(QUESTIONS)
        for expected, *place in (
            (None, "inner"),
            (None, "corruption"),
            (n, "meta_batch"),
            (n, "tuning", "tasks"),
            (n, "test", "tasks"),
            ([0], "test", "steps"),
            (1, "test", "support_shots"),
            (True, "test", "transductive"),
        ):
            found: object = reduce(getattr, place, self)
            if found != expected:
                shown = [json.dumps(value, default=str) for value in (expected, found)]
                raise LocatedError(
                    f"expected {shown[0]}, found {shown[1]}: multi-task training has the same {n} "
                    "tasks at every step and at the test, and adapts to none",
                    *place,
                )
        return self

    @model_validator(mode="after")
    def consistent(self) -> "Study":
        if self.baseline not in [method.name for method in self.methods]:
            raise LocatedError(
                f"the baseline {self.baseline!r} is not one of the methods", "baseline"
            )
        if self.test.steps != sorted(set(self.test.steps)):
            raise LocatedError(f"the steps {self.test.steps} do not rise", "test", "steps")
        if self.tuning.steps not in self.test.steps:
            raise LocatedError("tuning.steps is not among the test's steps", "tuning", "steps")
        shots = self.tasks.support_shots * (self.way or 1)
        batch_size = (self.inner and self.inner.batch_size) or 1
        if shots % batch_size:
            message = f"{batch_size} does not divide the {shots} support examples"
            raise LocatedError(message, "inner", "batch_size")
        if self.classes is None and self.model.kind == "conv4":
            message = f"a conv4 model needs drawings; {self.tasks.kind} tasks have numbers"
            raise LocatedError(message, "model")
        if self.model.kind == "conv4" and getattr(self.tasks, "inputs", DRAWING) != DRAWING:
            raise LocatedError(f"a conv4 model needs drawings of {DRAWING} numbers", "model")
        return self

    @model_validator(mode="after")
    def tunable(self) -> "Study":
        seeds = self.tuning.seeds
        if isinstance(seeds, int) and seeds > len(self.seeds):
            raise LocatedError(f"more than the study's {len(self.seeds)} seeds", "tuning", "seeds")
        if isinstance(seeds, list) and (shared := set(seeds) & set(self.seeds)):
            message = f"expected none of the study's seeds, found {min(shared)}; give others"
            raise LocatedError(message, "tuning", "seeds")
        expected = len(self.outer.rates)
        if self.outer.extend and expected == 1:
            message = "expected two rates or more to extend, found one; give more, or leave it out"
            raise LocatedError(message, "outer", "extend")
        for index, method in enumerate(self.methods):
            if (found := len(self.rates(method))) != expected:
                message = f"expected as many rates as outer.rates has, {expected}, found {found}; "
                message += "give every method as many"
                raise LocatedError(message, "methods", index, "rates")
        return self

    @model_validator(mode="after")
    def corrupted(self) -> "Study":
        if self.corruption is None:
            return self
        kind, foreign = self.corruption.kind, self.corruption.foreign
        if self.way is not None and foreign:
            raise LocatedError("there are no foreign tasks for drawings", "corruption", "foreign")
        if self.way is not None and kind == "label_noise":
            message = "classes take no noise; take shuffled_labels"
            raise LocatedError(message, "corruption", "kind")
        if kind == "flipped" and self.form.kind != "reptile":
            message = "only Reptile's tasks report their displacements; take the form reptile"
            raise LocatedError(message, "corruption", "kind")
        if foreign == getattr(self.tasks, "dataset", ""):
            message = f"the tasks of {foreign} are the study's own, not foreign"
            raise LocatedError(message, "corruption", "foreign")
        normalized = self.model.kind == "conv4" or getattr(self.model, "batch_norm", False)
        if kind == "outlier_scale" and self.way is not None and normalized:
            message = "BatchNorm divides the scale of drawings out again; take shuffled_labels"
            raise LocatedError(message, "corruption", "kind")
        alone = self.form.kind == "reptile" and self.tasks.support_shots == 1
        if kind == "shuffled_labels" and alone:
            of_class = " of each class" if self.way else ""
            message = f"labels of one example{of_class} are as good when shuffled; take more shots"
            raise LocatedError(message, "corruption", "kind")
        return self

    @model_validator(mode="after")
    def normalizable(self) -> "Study":
        if self.model.kind != "mlp" or not self.model.batch_norm:
            return self
        places = [("inner", "batch_size")]
        if self.way is None:  # classes are two at least, and so are their examples
            places += [("tasks", "support_shots")]
            places += [("test", "support_shots")] * self.adapts
            places += [("tasks", "query_shots")] * (self.adapts and self.form.kind != "reptile")
            places += [("test", "query_shots")] * self.test.transductive
        for section, key in places:
            if getattr(getattr(self, section), key, None) == 1:
                raise LocatedError("batch_norm needs batches of two or more", section, key)
        return self

    @model_validator(mode="after")
    def possible_in_form(self) -> "Study":
        if self.form.kind != "meta-sgd":
            return self
        if self.inner and self.inner.batch_size is not None:
            message = "Meta-SGD takes each step on the whole support set; leave it out"
            raise LocatedError(message, "inner", "batch_size")
        for index, method in enumerate(self.methods):
            scopes = {part.options.get("scope", "global") for part in (method, *method.nested)}
            if scopes != {"global"}:
                message = "Meta-SGD's displacement has no leaf for the rates; leave scope out"
                raise LocatedError(message, "methods", index, "options", "scope")
        return self

    @model_validator(mode="after")
    def tried(self) -> "Study":
        for index, method in enumerate(self.methods):
            if method.references:
                continue
            try:
                method.try_on(self.meta_batch)
            except ImportError:
                continue  # as in Method.accepted
            except (TypeError, ValueError) as error:
                message = f"a batch of {self.meta_batch} tasks: {error}"
                raise LocatedError(message, "methods", index, "options") from None
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
        return "finn" if self.tasks.kind == "mini-imagenet" else "nichol"

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
