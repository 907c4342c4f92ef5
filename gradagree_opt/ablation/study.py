"""The schema of a study file."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from gradagree_opt.ablation.methods import LocatedError, Method
from gradagree_opt.tasks.corrupted import Corruption
from gradagree_opt.tasks.grouped import Dataset

DRAWING = 28 * 28
Network = Literal["finn", "nichol"]


class StudyError(ValueError):
    """A mistake in a study file, an option or an output folder, told in one sentence."""


class Section(BaseModel):
    """A part of the study file: no unknown keys, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def unique(entries: list[Any]) -> list[Any]:
    """The entries, unless two of them are equal or have one name."""
    names = [getattr(entry, "name", entry) for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is given more than once")
    return entries


class SineTasks(Section):
    kind: Literal["sine"]
    ranges: Literal["paper", "finn"] = "paper"
    support: Literal["uniform", "shuffled_grid"] = "uniform"
    support_shots: PositiveInt
    query_shots: PositiveInt = 1


class OmniglotTasks(Section):
    """Omniglot; the split ``background`` is the ``background_validation`` of the distribution."""

    kind: Literal["omniglot"]
    split: Literal["vinyals", "background"] = "vinyals"
    rotations: bool = False
    way: Annotated[int, Field(ge=2)] = 5
    support_shots: PositiveInt
    query_shots: PositiveInt = 1


class MiniImageNetTasks(Section):
    kind: Literal["mini-imagenet"]
    way: Annotated[int, Field(ge=2)] = 5
    support_shots: PositiveInt
    query_shots: PositiveInt = 1


class Learn2LearnTasks(Section):
    """Tasksets of learn2learn, made by a function of the user's.

    ``tasksets`` names it as ``module:function``, in a module that Python finds from the current
    folder. It is called as ``learn2learn.vision.benchmarks.get_tasksets`` is: with ``train_ways``,
    ``train_samples``, ``test_ways``, ``test_samples``, ``root`` (the --data, where there is some)
    and the ``options``, and gives the training, validation and test taskset.
    """

    kind: Literal["learn2learn"]
    tasksets: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    options: dict[str, bool | int | float | str] = {}
    inputs: PositiveInt = DRAWING
    way: Annotated[int, Field(ge=2)] = 5
    support_shots: PositiveInt
    query_shots: PositiveInt = 1


class GroupedTasks(Section):
    kind: Literal["grouped"]
    dataset: Dataset
    support_shots: PositiveInt
    query_shots: PositiveInt = 1


def one_or_list(value: Any) -> Literal["one", "list"]:
    return "list" if isinstance(value, list) else "one"


class CorruptionSection(Section):
    """What spoils training tasks: see :class:`gradagree_opt.tasks.Corrupted`.

    Of several fractions, of which the first may be 0, each is a study of its own.
    """

    kind: Corruption
    fraction: Annotated[
        Annotated[float, Field(gt=0, le=1), Tag("one")]
        | Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1), Tag("list")],
        Discriminator(one_or_list),
    ]
    scale: float | None = None
    foreign: Literal["lines", Dataset] | None = None

    @property
    def fractions(self) -> list[float]:
        return self.fraction if isinstance(self.fraction, list) else [self.fraction]

    @model_validator(mode="after")
    def complete(self) -> "CorruptionSection":
        if self.fractions != sorted(set(self.fractions)):
            raise LocatedError(f"the fractions {self.fractions} do not rise", "fraction")
        for option, kind in (("scale", "outlier_scale"), ("foreign", "foreign")):
            there, wanted = getattr(self, option) is not None, self.kind == kind
            if wanted and not there:
                raise LocatedError(f"kind {kind!r} needs the key {option!r}", "kind")
            if there and not wanted:
                raise LocatedError(f"{option!r} goes with kind {kind!r}, and with no other", option)
        return self


class MLP(Section):
    kind: Literal["mlp"]
    hidden: list[PositiveInt]
    activation: Literal["relu", "tanh"] = "relu"
    batch_norm: bool = False


class Conv4(Section):
    """Finn et al.'s or Nichol et al.'s network for such tasks, or the study's usual one."""

    kind: Literal["conv4"]
    filters: PositiveInt = 32
    network: Network | None = None


class ReptileForm(Section):
    kind: Literal["reptile"]


class MAMLForm(Section):
    kind: Literal["maml", "anil"]
    first_order: bool = False
    signal: Literal["displacement", "gradient"] = "displacement"


class MetaSGDForm(Section):
    kind: Literal["meta-sgd"]
    first_order: bool = False


class Inner(Section):
    lr: PositiveFloat
    steps: PositiveInt
    batch_size: PositiveInt | None = None


class Outer(Section):
    optimizer: Literal["sgd", "adam"]
    rates: Annotated[list[PositiveFloat], Field(min_length=1), AfterValidator(unique)]
    schedule: Literal["constant", "linear"] = "constant"


class Tuning(Section):
    seeds: PositiveInt
    tasks: PositiveInt
    steps: PositiveInt


class Test(Section):
    __test__ = False  # not a test class, whatever pytest thinks of its name

    tasks: PositiveInt
    support_shots: PositiveInt
    query_shots: PositiveInt
    steps: Annotated[list[NonNegativeInt], Field(min_length=1)]
    transductive: bool = True


class Study(Section):
    """Everything that defines a study; the fields are explained in ``studies/sine.yaml``."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: Annotated[str, Field(pattern=r"^[^\r\n]+$")]
    tasks: Annotated[
        SineTasks | GroupedTasks | OmniglotTasks | MiniImageNetTasks | Learn2LearnTasks,
        Field(discriminator="kind"),
    ]
    model: Annotated[MLP | Conv4, Field(discriminator="kind")]
    form: Annotated[ReptileForm | MAMLForm | MetaSGDForm, Field(discriminator="kind")]
    inner: Inner
    outer: Outer
    corruption: CorruptionSection | None = None
    iterations: PositiveInt
    meta_batch: PositiveInt
    compile: Literal["auto", True, False] = "auto"
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(unique)]
    tuning: Tuning
    test: Test
    methods: Annotated[list[Method], Field(min_length=1), AfterValidator(unique)]
    baseline: str
    quick: dict[str, Any] | None = None

    @model_validator(mode="after")
    def consistent(self) -> "Study":
        if self.baseline not in [method.name for method in self.methods]:
            raise LocatedError(
                f"the baseline {self.baseline!r} is not one of the methods", "baseline"
            )
        if self.tuning.seeds > len(self.seeds):
            raise LocatedError(f"more than the study's {len(self.seeds)} seeds", "tuning", "seeds")
        if self.test.steps != sorted(set(self.test.steps)):
            raise LocatedError(f"the steps {self.test.steps} do not rise", "test", "steps")
        if self.tuning.steps not in self.test.steps:
            raise LocatedError("tuning.steps is not among the test's steps", "tuning", "steps")
        shots = self.tasks.support_shots * (self.way or 1)
        if shots % (self.inner.batch_size or 1):
            message = f"{self.inner.batch_size} does not divide the {shots} support examples"
            raise LocatedError(message, "inner", "batch_size")
        if self.way is None and self.model.kind == "conv4":
            message = f"a conv4 model needs drawings; {self.tasks.kind} tasks have numbers"
            raise LocatedError(message, "model")
        if self.model.kind == "conv4" and getattr(self.tasks, "inputs", DRAWING) != DRAWING:
            raise LocatedError(f"a conv4 model needs drawings of {DRAWING} numbers", "model")
        return self

    @model_validator(mode="after")
    def corrupted(self) -> "Study":
        if self.corruption is None:
            return self
        kind, foreign = self.corruption.kind, self.corruption.foreign
        if self.way is not None and foreign:
            raise LocatedError("there are no foreign tasks for drawings", "corruption", "foreign")
        if foreign == getattr(self.tasks, "dataset", ""):
            message = f"the tasks of {foreign} are the study's own, not foreign"
            raise LocatedError(message, "corruption", "foreign")
        normalized = self.model.kind == "conv4" or self.model.batch_norm
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
            places += [("tasks", "support_shots"), ("test", "support_shots")]
            places += [("tasks", "query_shots")] * (self.form.kind != "reptile")
            places += [("test", "query_shots")] * self.test.transductive
        for section, key in places:
            if getattr(getattr(self, section), key) == 1:
                raise LocatedError("batch_norm needs batches of two or more", section, key)
        return self

    @model_validator(mode="after")
    def possible_in_form(self) -> "Study":
        if self.form.kind != "meta-sgd":
            return self
        if self.inner.batch_size is not None:
            message = "Meta-SGD takes each step on the whole support set; leave it out"
            raise LocatedError(message, "inner", "batch_size")
        for index, method in enumerate(self.methods):
            if method.options.get("scope", "global") != "global":
                message = "Meta-SGD's displacement has no leaf for the rates; leave scope out"
                raise LocatedError(message, "methods", index, "options", "scope")
        return self

    @model_validator(mode="after")
    def tried(self) -> "Study":
        for index, method in enumerate(self.methods):
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

    @property
    def fraction(self) -> float:
        """The share of its training tasks that are corrupted, for one of its parts."""
        [fraction] = self.corruption.fractions if self.corruption else [0.0]
        return fraction

    @property
    def usual_network(self) -> Network:
        """Whose a conv4 model is that does not say: Nichol's for drawings, else Finn's."""
        return "finn" if self.tasks.kind == "mini-imagenet" else "nichol"

    @property
    def way(self) -> int | None:
        """Classes of a task, None for regression."""
        return getattr(self.tasks, "way", None)
