"""The methods a study compares: each is one of the library's aggregators, or of TorchJD's."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import NoneType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from torch import Generator

import gradagree_opt as ga
from gradagree_opt.ablation.section import LocatedError, Optimizer, Rates
from gradagree_opt.frameworks import require

AGGREGATORS: dict[str, type[Any]] = {
    "mean": ga.Mean,
    "sum": ga.Sum,
    "gradient_agreement": ga.GradientAgreement,
    "equal_agreement": ga.EqualAgreement,
    "gramian_power": ga.GramianPower,
    "norm_clipped": ga.NormClipped,
    "geometric_median": ga.GeometricMedian,
    "norm_share": ga.NormShare,
    "random_weights": ga.RandomWeights,
}
DESCRIPTIONS = {
    bool: "true or false",
    float: "a number",
    str: "a word",
    NoneType: "null",
    ga.Aggregator: "an aggregator",
}
TORCHJD = "torchjd."
"""What the names of TorchJD's aggregators begin with."""


def plain_or_nested(value: Any) -> Literal["plain", "nested"]:
    return "nested" if isinstance(value, dict | Recipe) else "plain"


Option: TypeAlias = Annotated[
    Annotated[bool | float | str | None, Tag("plain")] | Annotated["Recipe", Tag("nested")],
    Discriminator(plain_or_nested),
]


class Recipe(BaseModel):
    """An aggregator and its keyword options, some of which may be aggregators too."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    aggregator: str
    options: dict[str, Option] = {}

    @property
    def nested(self) -> "list[Recipe]":
        """Those of its options that are aggregators."""
        return [value for value in self.options.values() if isinstance(value, Recipe)]

    @property
    def of_torchjd(self) -> bool:
        """Whether TorchJD has a part in it, which solves on the host: no vmap, no torch.compile."""
        return self.aggregator.startswith(TORCHJD) or any(part.of_torchjd for part in self.nested)

    @model_validator(mode="after")
    def accepted(self) -> "Recipe":
        # That TorchJD is missing is no mistake in the file: build says so where a study is run.
        with suppress(ImportError):
            self.check()
        return self

    def check(self) -> None:
        theirs = self.aggregator.startswith(TORCHJD)
        there = torchjd_aggregators() if theirs else AGGREGATORS
        if self.aggregator not in there:
            others = "" if theirs else f", and TorchJD's as {TORCHJD}UPGrad"
            message = f"unknown aggregator {self.aggregator!r}; there are {', '.join(there)}"
            raise LocatedError(message + others, "aggregator")
        make = there[self.aggregator]
        known = plain_options(make)
        has = f"{self.aggregator} has {', '.join(known) or 'none'}"
        for option in self.options:
            if option not in known:
                raise LocatedError(f"unknown option {option!r}; {has}", "options", option)
        for option, value in self.options.items():
            nested = isinstance(value, Recipe)
            if not (ga.Aggregator in known[option] if nested else isinstance(value, known[option])):
                found = DESCRIPTIONS[ga.Aggregator] if nested else repr(value)
                message = f"expected {described(known[option])} for {option!r}, found {found}"
                raise LocatedError(message, "options", option)
            if option in ("nonfinite", "degenerate") and value == "raise":
                message = "'raise' would end the study; give a policy that goes on, or leave it out"
                raise LocatedError(message, "options", option)
        for option in needed_options(make) & known.keys() - self.options.keys():
            raise LocatedError(f"the option {option!r} is missing; {has}", "options")
        try:
            self.build(Generator())
        except (TypeError, ValueError) as error:
            raise LocatedError(str(error), "options") from None

    def build(self, generator: Generator) -> ga.Aggregator:
        """The aggregator, which has seen no batch yet; only random weights draw from the generator.

        A batch that overflows is left to do so, unless an option says otherwise: the run's loss
        shows it, and a rate at which a method diverges is a result.

        Raises:
            ImportError: TorchJD, or a solver that it needs, is missing; one sentence that ends in
                the command that installs it.
        """
        aggregator: ga.Aggregator
        if self.aggregator.startswith(TORCHJD):
            theirs = torchjd_aggregators()[self.aggregator](**self.whole_options())
            from gradagree_opt.adapters.torchjd import from_torchjd

            aggregator = from_torchjd(theirs, nonfinite="propagate")
        else:
            make = AGGREGATORS[self.aggregator]
            given: dict[str, Any] = {"generator": generator, "nonfinite": "propagate"}
            for name, value in self.options.items():
                given[name] = value.build(generator) if isinstance(value, Recipe) else value
            parameters = inspect.signature(make).parameters
            first = [
                given.pop(name) for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY
            ]
            named = {name: value for name, value in given.items() if name in parameters}
            aggregator = make(*first, **named)
        return aggregator

    def whole_options(self) -> dict[str, Any]:
        """The options, whole numbers as integers: TorchJD counts by some, and takes all of them."""
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in self.options.items()
        }


class Named(BaseModel):
    """What has a name, of one line."""

    name: Annotated[str, Field(pattern=r"^[^\r\n]+$")]


class Method(Recipe, Named):  # a study is written with the fields of the last base first
    """One row of the table: an aggregator by a name.

    Attributes:
        rates: The outer rates that it is tuned on in place of the study's.
        outer: The outer optimizer that it is trained with in place of the study's.
    """

    rates: Rates | None = None
    outer: Optimizer | None = None

    def try_on(self, n_tasks: int) -> None:
        """Aggregates as many tasks as a batch has: some of TorchJD's aggregators mind.

        Raises:
            ImportError: as :meth:`build`.
            TypeError, ValueError: the aggregator refuses them.
        """
        tasks = torch.randn(n_tasks, 2, generator=Generator().manual_seed(0))
        with without_advice(), torch.random.fork_rng(devices=[]):
            self.build(Generator()).aggregate(tasks)


def torchjd_aggregators() -> dict[str, type[Any]]:
    """Those of TorchJD's aggregators that plain options are enough to make.

    Raises:
        ImportError: TorchJD is missing or unsupported; one sentence that ends in the command that
            installs it.
    """
    require("torchjd")
    from torchjd import aggregation

    public = [getattr(aggregation, name) for name in aggregation.__all__]
    return {
        TORCHJD + kind.__name__: kind
        for kind in public
        if inspect.isclass(kind)
        and issubclass(kind, aggregation.Aggregator)
        and not inspect.isabstract(kind)
        and needed_options(kind) <= plain_options(kind).keys()
    }


def needed_options(make: type[Any]) -> set[str]:
    parameters = inspect.signature(make).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is parameter.empty}


def plain_options(make: type[Any]) -> dict[str, tuple[type, ...]]:
    """The options of a class that a study file can give, and the types of their values."""
    hints = get_type_hints(make.__init__)
    types = {name: plain_types(hints[name]) for name in inspect.signature(make).parameters}
    return {name: kinds for name, kinds in types.items() if set(kinds) - {NoneType}}


def plain_types(hint: Any) -> tuple[type, ...]:
    """Those of a hint, or of the members of a union, that a study file can give; 3 is a float."""
    if get_origin(hint) is Literal:
        return tuple({type(word) for word in get_args(hint)})
    if hint in (bool, int, float, str, NoneType):
        return (float if hint is int else hint,)
    if inspect.isclass(hint) and issubclass(hint, ga.Aggregator):
        return (ga.Aggregator,)
    return tuple({kind for member in get_args(hint) for kind in plain_types(member)})


def described(kinds: tuple[type, ...]) -> str:
    *first, last = sorted(DESCRIPTIONS[kind] for kind in kinds)
    return f"{', '.join(first)} or {last}" if first else last


@contextmanager
def without_advice() -> Iterator[None]:
    """Inside, solvers do not tell how TorchJD would better use them, nor that it goes on anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torchjd\.")
        yield
