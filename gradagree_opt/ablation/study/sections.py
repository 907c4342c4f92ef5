"""The sections of a study file, each by itself."""

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from gradagree_opt.ablation.section import (
    LocatedError,
    Optimizer,
    Options,
    Rates,
    Reference,
    Section,
    Seeds,
)
from gradagree_opt.tasks.corrupted import Corruption
from gradagree_opt.tasks.grouped import Dataset

DRAWING = 28 * 28
NEEDED_OPTIONS = {
    "scale": ("label_noise", "outlier_scale", "flipped"),
    "foreign": ("foreign",),
}
"""The kinds of corruption that each of its further keys goes with."""
Network = Literal["finn", "nichol"]
Steps = Annotated[int, Field(ge=0, le=10**6)]
Size = Annotated[int, Field(gt=0, le=10**9)]
"""More than that, and products of them, numbers of the machine do not hold."""
LARGEST = 3.4e38
"""Beyond it float32, in which studies are trained, holds no number."""
Decay = Annotated[float, Field(ge=0, lt=1)]


def one_or_list(value: Any) -> Literal["one", "list"]:
    return "list" if isinstance(value, list) else "one"


class CorruptionSection(Section):
    """What spoils training tasks: see :class:`gradagree_opt.tasks.Corrupted`.

    ``flipped`` spoils what a task reports, not its examples: see :class:`.forms.Flipped`.

    Of several fractions, of which the first may be 0, each is a study of its own.
    """

    kind: Corruption | Literal["flipped"]
    fraction: Annotated[
        Annotated[float, Field(gt=0, le=1), Tag("one")]
        | Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1), Tag("list")],
        Discriminator(one_or_list),
    ]
    scale: Annotated[float, Field(ge=-LARGEST, le=LARGEST)] | None = None
    foreign: Literal["lines", "fast_sines", Dataset] | None = None

    @property
    def fractions(self) -> list[float]:
        return self.fraction if isinstance(self.fraction, list) else [self.fraction]

    @model_validator(mode="after")
    def complete(self) -> "CorruptionSection":
        if self.fractions != sorted(set(self.fractions)):
            raise LocatedError(f"the fractions {self.fractions} do not rise", "fraction")
        for option, kinds in NEEDED_OPTIONS.items():
            there, wanted = getattr(self, option) is not None, self.kind in kinds
            if wanted and not there:
                raise LocatedError(f"kind {self.kind!r} needs the key {option!r}", "kind")
            if there and not wanted:
                known = " or ".join(map(repr, kinds))
                raise LocatedError(f"{option!r} goes with kind {known}, and with no other", option)
        if self.kind in ("label_noise", "flipped") and self.scale is not None and self.scale <= 0:
            raise LocatedError(f"{self.kind} needs a scale above 0, found {self.scale:g}", "scale")
        return self


class MLP(Section):
    kind: Literal["mlp"]
    hidden: list[Size]
    activation: Literal["relu", "tanh"] = "relu"
    batch_norm: bool = False


class Conv4(Section):
    """Finn et al.'s or Nichol et al.'s network for such tasks, or the study's usual one."""

    kind: Literal["conv4"]
    filters: Size = 32
    network: Network | None = None


class OwnModel(Section):
    """A network of the user's own.

    ``make`` names, as ``module:name``, what is called with ``inputs``, the numbers in one example,
    ``outputs`` and the ``options``, and gives an ``nn.Module``.
    """

    kind: Literal["own"]
    make: Reference
    options: Options = Field(default_factory=dict)


class ReptileForm(Section):
    kind: Literal["reptile"]


class MAMLForm(Section):
    kind: Literal["maml", "anil"]
    first_order: bool = False
    signal: Literal["displacement", "gradient"] = "displacement"


class MetaSGDForm(Section):
    kind: Literal["meta-sgd"]
    first_order: bool = False


class MultiTaskForm(Section):
    kind: Literal["multi-task"]


class Inner(Section):
    """``betas`` are Adam's, 0.9 and 0.999 where they are not given."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Annotated[PositiveFloat, Field(le=LARGEST)]
    steps: Annotated[Steps, Field(gt=0)]
    batch_size: PositiveInt | None = None
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def goes_with_its_optimizer(self) -> "Inner":
        if self.betas is not None and self.optimizer != "adam":
            raise LocatedError(
                "only Adam has betas; take optimizer: adam, or leave them out", "betas"
            )
        return self


class Outer(Section):
    optimizer: Optimizer
    rates: Rates
    extend: NonNegativeInt = 0
    schedule: Literal["constant", "linear"] = "constant"


class Tuning(Section):
    seeds: Annotated[
        Annotated[PositiveInt, Tag("one")] | Annotated[Seeds, Tag("list")],
        Discriminator(one_or_list),
    ]
    tasks: Size
    steps: Steps


class Test(Section):
    """Where the form adapts, ``support_shots`` has to be given: see :class:`Study`."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    tasks: Size
    support_shots: Size = 1
    query_shots: Size
    steps: Annotated[list[Steps], Field(min_length=1)]
    transductive: bool = True
