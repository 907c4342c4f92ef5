"""The methods a study compares: each is one of the library's aggregators and its options."""

import inspect
from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Generator

import gradagree_opt as ga

AGGREGATORS: dict[str, Callable[..., ga.Aggregator]] = {
    "mean": ga.Mean,
    "sum": ga.Sum,
    "gradient_agreement": ga.GradientAgreement,
    "norm_share": ga.NormShare,
    "random_weights": ga.RandomWeights,
}


class LocatedError(ValueError):
    """A value that contradicts another one, and the keys that lead to it."""

    def __init__(self, message: str, *location: str) -> None:
        super().__init__(message)
        self.location = location


class Method(BaseModel):
    """One row of the table: a name, an aggregator, and that aggregator's keyword options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    aggregator: str
    options: dict[str, bool | float | str] = {}

    @field_validator("aggregator")
    @classmethod
    def known(cls, aggregator: str) -> str:
        if aggregator not in AGGREGATORS:
            known = ", ".join(AGGREGATORS)
            raise ValueError(f"unknown aggregator {aggregator!r}; there are {known}")
        return aggregator

    @model_validator(mode="after")
    def accepted(self) -> "Method":
        parameters = inspect.signature(AGGREGATORS[self.aggregator]).parameters
        known = [name for name in parameters if name != "generator"]
        for option in self.options:
            if option not in known:
                there = f"{self.aggregator} has {', '.join(known)}"
                raise LocatedError(f"unknown option {option!r}; {there}", "options", option)
        try:
            self.build(Generator())
        except (TypeError, ValueError) as error:
            raise LocatedError(str(error), "options") from None
        return self

    def build(self, generator: Generator) -> ga.Aggregator:
        """The aggregator; only random weights draw from the generator.

        A batch that overflows is left to do so, unless an option says otherwise: the run's loss
        shows it, and a rate at which a method diverges is a result.
        """
        arguments = (generator,) if self.aggregator == "random_weights" else ()
        return AGGREGATORS[self.aggregator](
            *arguments, **{"nonfinite": "propagate", **self.options}
        )
