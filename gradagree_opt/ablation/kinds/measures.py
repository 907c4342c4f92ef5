"""How the test score of a kind of tasks is shown."""

from typing import NamedTuple


class Measure(NamedTuple):
    """The name of a score, its column in a file, and how its numbers are written."""

    name: str
    column: str
    factor: float
    digits: str
    higher_is_better: bool


ACCURACY = Measure("accuracy in %", "accuracy", 100.0, ".1f", higher_is_better=True)
ERROR = Measure("mean squared error", "mse", 1.0, ".4f", higher_is_better=False)
STANDARDISED_ERROR = ERROR._replace(name=f"{ERROR.name} in variances of the training data")
