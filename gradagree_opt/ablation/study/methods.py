"""The methods of a study: the library's aggregators, TorchJD's, or the user's own."""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from torch import Generator

import gradagree_opt as ga
from gradagree_opt.ablation import own
from gradagree_opt.ablation.section import REFERENCE, LocatedError, Optimizer, Rates, Section
from gradagree_opt.core.pipeline import Pipeline
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


class Recipe(Section):
    """An aggregator and its keyword options, some of which may be aggregators too."""

    model_config = ConfigDict(allow_inf_nan=True)  # what an option may be, the aggregator says

    aggregator: str
    options: dict[str, Option] = Field(default_factory=dict)

    @property
    def nested(self) -> "list[Recipe]":
        """Those of its options that are aggregators."""
        return [value for value in self.options.values() if isinstance(value, Recipe)]

    @property
    def of_torchjd(self) -> bool:
        """Whether TorchJD has a part in it, which solves on the host: no vmap, no torch.compile."""
        return self.aggregator.startswith(TORCHJD) or any(part.of_torchjd for part in self.nested)

    @property
    def is_own(self) -> bool:
        """Whether it is the user's own: a class of aggregator or weighting, or a weighting."""
        return re.match(REFERENCE, self.aggregator) is not None

    @property
    def references(self) -> list[str]:
        """What it names of the user's own, as ``module:name``."""
        return [self.aggregator] * self.is_own + [
            n for part in self.nested for n in part.references
        ]

    @model_validator(mode="wrap")
    @classmethod
    def accepted(cls, value: Any, validate: Callable[[Any], "Recipe"]) -> "Recipe":
        if isinstance(value, cls):
            return value  # as every run of a study has its method
        recipe = validate(value)
        if not recipe.references:  # those are imported, and checked, where the study is run
            # That TorchJD is missing is no mistake in the file: build says so where it is run.
            with suppress(ImportError):
                recipe.check()
        return recipe

    @property
    def classes(self) -> list[type[Any]]:
        """Whose options it has: the aggregator's; of a weighting of the user's own, both classes'.

        Raises:
            ImportError: TorchJD is missing.
            ValueError: There is no such aggregator.
        """
        if self.is_own:
            found = own.find(self.aggregator)
            if not callable(found):
                raise ValueError(f"expected a class or a function, found {found!r}")
            is_aggregator = inspect.isclass(found) and issubclass(found, ga.Aggregator)
            return [found] * inspect.isclass(found) + [ga.Aggregator] * (not is_aggregator)
        theirs = self.aggregator.startswith(TORCHJD)
        there = torchjd_aggregators() if theirs else AGGREGATORS
        if self.aggregator not in there:
            others = (
                "" if theirs else f", and TorchJD's as {TORCHJD}UPGrad, or your own as module:Name"
            )
            message = f"unknown aggregator {self.aggregator!r}; there are {', '.join(there)}"
            raise LocatedError(message + others, "aggregator")
        return [there[self.aggregator]]

    def check(self) -> None:
        """Raises a LocatedError unless there is such an aggregator, and it takes the options."""
        classes = self.classes
        known = {name: kinds for each in classes for name, kinds in plain_options(each).items()}
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
        needed = {name for each in classes for name in needed_options(each)}
        for option in needed & known.keys() - self.options.keys():
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
        classes = self.classes
        if self.aggregator.startswith(TORCHJD):
            from gradagree_opt.adapters.torchjd import from_torchjd

            return from_torchjd(classes[0](**self.whole_options()), nonfinite="propagate")
        given: dict[str, Any] = {"generator": generator, "nonfinite": "propagate"}
        options = self.whole_options() if self.is_own else self.options
        for name, value in options.items():
            given[name] = value.build(generator) if isinstance(value, Recipe) else value
        if self.is_own and classes[-1] is ga.Aggregator:
            found = own.find(self.aggregator)
            given["weighting"] = call_with(found, given) if inspect.isclass(found) else found
        aggregator: ga.Aggregator = call_with(classes[-1], given)
        return aggregator

    def whole_options(self) -> dict[str, Any]:
        """The options, whole numbers as integers: classes of others count by some."""
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

    def try_own(self, n_tasks: int) -> None:
        """What :meth:`check` and :meth:`try_on` do, for a method with parts of the user's own.

        Raises:
            ValueError: in one sentence, whatever the user's code raises, under vmap too, where a
                study's runs are trained.
        """
        try:
            self.check()
            self.try_on(n_tasks)
            aggregator = self.build(Generator()).for_batch(n_tasks)
            torch.vmap(lambda tasks: aggregator.aggregate_unchecked(tasks).update)(
                torch.randn(2, n_tasks, 2)
            )
        except LocatedError:
            raise
        except Exception as error:
            raise ValueError(own.told(error)) from None


@cache
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


def call_with(make: type[Any], given: dict[str, Any]) -> Any:
    """What a class makes of those of the arguments that it takes."""
    parameters = inspect.signature(make).parameters.values()
    taken = [parameter for parameter in parameters if parameter.name in given]
    first = [given[each.name] for each in taken if each.kind is each.POSITIONAL_ONLY]
    rest = {each.name: given[each.name] for each in taken if each.kind is not each.POSITIONAL_ONLY}
    return make(*first, **rest)


def needed_options(make: type[Any]) -> set[str]:
    parameters = inspect.signature(make).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is parameter.empty}


def plain_options(make: type[Any]) -> dict[str, tuple[type, ...]]:
    """The options of a class that a study file can give, and the types of their values.

    A parameter without a type takes all of them.
    """
    hints = get_type_hints(make.__init__)
    types = {
        name: plain_types(hints.get(name, bool | float | str | None))
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    return {name: kinds for name, kinds in types.items() if set(kinds) - {NoneType}}


def plain_types(hint: Any) -> tuple[type, ...]:
    """Those of a hint, or of the members of a union, that a study file can give; 3 is a float."""
    if get_origin(hint) is Literal:
        return tuple({type(word) for word in get_args(hint)})
    if hint in (bool, int, float, str, NoneType):
        return (float if hint is int else hint,)
    if inspect.isclass(hint) and issubclass(hint, Pipeline):
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
