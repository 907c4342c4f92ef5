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
                raise ValueError(
                    f"unknown option {option!r} of {self.aggregator}; there are {', '.join(known)}"
                )
        try:
            self.build(Generator())
        except TypeError as error:
            raise ValueError(
                f"an option of {self.aggregator} has the wrong type: {error}"
            ) from None
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
