"""Linear regression: every task is one straight line, at the inputs of a sine distribution."""

from dataclasses import dataclass, field

import torch

from gradagree_opt.annotations import Float
from gradagree_opt.tasks.protocol import Batch, Split
from gradagree_opt.tasks.sine import Sine, check_interval, uniform


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Regression on ``f(x) = slope · x + intercept``, both drawn uniformly for every task.

    What sine tasks are mixed with where a benchmark wants two kinds of function.

    Args:
        slope: lowest and highest slope.
        intercept: lowest and highest intercept.
        inputs: the distribution whose inputs, shots and dtype the tasks have.

    Raises:
        ValueError: an interval is not (low, high) with finite low <= high.

    Source: Finn, Xu and Levine 2018, section 5 (sines and lines, both from U[-3, 3]).

    >>> tasks = Lines().sample(4, generator=torch.Generator().manual_seed(0))
    >>> x, y = tasks["support"]
    >>> torch.allclose(y[:, 2] - y[:, 0], (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    ...     / (x[:, 1] - x[:, 0]), atol=1e-3)
    True
    """

    slope: tuple[float, float] = (-3.0, 3.0)
    intercept: tuple[float, float] = (-3.0, 3.0)
    inputs: Sine = field(default_factory=Sine)

    def __post_init__(self) -> None:
        check_interval("slope", self.slope)
        check_interval("intercept", self.intercept)

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        """Draw tasks, as :meth:`Sine.sample` does: ``split`` is checked and without effect.

        Returns:
            ``{"support": (x, y), "query": (x, y)}``, x and y both ``[n_tasks, shots, 1]``.

        Raises:
            TypeError: ``n_tasks`` is not an integer or ``generator`` not a ``torch.Generator``.
            ValueError: ``n_tasks`` is below 1 or ``split`` is unknown.
        """
        tasks = self.inputs.sample(n_tasks, split=split, generator=generator)
        shape, dtype = (n_tasks, 1, 1), self.inputs.dtype
        slope: Float[torch.Tensor, "n 1 1"] = uniform(self.slope, shape, dtype, generator)
        intercept: Float[torch.Tensor, "n 1 1"] = uniform(self.intercept, shape, dtype, generator)
        return {part: (x, slope * x + intercept) for part, (x, _) in tasks.items()}
