"""Sine regression: every task is one sine curve with its own amplitude, phase and frequency."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gradagree_opt.annotations import Float
from gradagree_opt.options import check_choice
from gradagree_opt.tasks.draws import random_subsets
from gradagree_opt.tasks.protocol import Batch, Split, check_options, check_sample_arguments

Support = Literal["uniform", "shuffled_grid"]
Query = Literal["uniform", "grid"]


@dataclass(frozen=True, kw_only=True)
class Sine:
    """Regression on ``f(x) = amplitude · sin(frequency · x + phase)``, drawn anew for every task.

    Amplitude, phase and frequency are uniform in their intervals. The defaults are the paper's
    distribution: amplitude U[0.1, 5], phase U[0, 2π], frequency 1, 10 support points. The paper
    does not say where the inputs lie nor how many points its loss is the mean of: the range of
    inputs and the 50 query points are those of OpenAI's Reptile demo. Set-ups of others::

        Sine(phase=(0.0, math.pi), query_shots=10)                       # Finn et al. 2017
        Sine(support="shuffled_grid", support_shots=50, query="grid")    # OpenAI's Reptile demo

    In the second the support set is the whole grid in random order, so that an inner loop over
    consecutive minibatches of ten (``InnerSGD(lr, steps=5, batch_size=10)``) sees each point once.

    A continuous distribution has no list of tasks to divide: no task comes twice, and train,
    validation and test are different streams of draws. ``split`` changes nothing, **the caller
    gives each split a generator with a seed of its own**; the same seed gives the same tasks.

    Args:
        amplitude: lowest and highest amplitude.
        phase: lowest and highest phase, in radians.
        frequency: lowest and highest frequency, in radians per unit of the input.
        x_range: lowest and highest input.
        support_shots: support points per task.
        query_shots: query points per task.
        support: ``"uniform"`` draws inputs from ``x_range``; ``"shuffled_grid"`` takes
            ``support_shots`` evenly spaced ones, both ends included, in an order drawn per task.
        query: ``"uniform"``, or ``"grid"`` for ``query_shots`` evenly spaced inputs in rising
            order: the whole range, as a test protocol wants it.
        dtype: of the sampled tensors.

    Raises:
        ValueError: an interval is not (low, high) with finite low <= high, a number of shots is
            below 1 or an option is unknown.
        TypeError: ``dtype`` is not a floating one.

    Source: Gradient Agreement (2018), section on sine regression; Finn et al. 2017, section 5.1.

    >>> tasks = Sine().sample(4, generator=torch.Generator().manual_seed(0))
    >>> x, y = tasks["support"]
    >>> x.shape, y.shape, tasks["query"][0].shape
    (torch.Size([4, 10, 1]), torch.Size([4, 10, 1]), torch.Size([4, 50, 1]))
    """

    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, 2 * math.pi)
    frequency: tuple[float, float] = (1.0, 1.0)
    x_range: tuple[float, float] = (-5.0, 5.0)
    support_shots: int = 10
    query_shots: int = 50
    support: Support = "uniform"
    query: Query = "uniform"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("amplitude", "phase", "frequency", "x_range"):
            check_interval(name, getattr(self, name))
        check_choice("support", self.support, get_args(Support))
        check_choice("query", self.query, get_args(Query))
        check_options(self.dtype, support_shots=self.support_shots, query_shots=self.query_shots)

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        """Draw tasks, all at once: ``n * m`` tasks reshaped to ``[n, m]`` are n draws of m tasks.

        Args:
            n_tasks: number of tasks.
            split: checked and otherwise without effect, see the class.
            generator: a seeded generator of the split's own; the tensors are on its device.

        Returns:
            ``{"support": (x, y), "query": (x, y)}``, x and y both ``[n_tasks, shots, 1]``.

        Raises:
            TypeError: ``n_tasks`` is not an integer or ``generator`` not a ``torch.Generator``.
            ValueError: ``n_tasks`` is below 1 or ``split`` is unknown.
        """
        check_sample_arguments(n_tasks, split, generator)
        parameters = self.sample_parameters(n_tasks, generator)
        if self.support == "uniform":
            shape = (n_tasks, self.support_shots, 1)
            support = uniform(self.x_range, shape, self.dtype, generator)
        else:
            order = random_subsets((n_tasks,), self.support_shots, self.support_shots, generator)
            support = self._grid(self.support_shots, generator)[order].unsqueeze(-1)
        if self.query == "uniform":
            shape = (n_tasks, self.query_shots, 1)
            query = uniform(self.x_range, shape, self.dtype, generator)
        else:
            query = self._grid(self.query_shots, generator).repeat(n_tasks, 1).unsqueeze(-1)
        return {
            "support": (support, self.targets(support, *parameters)),
            "query": (query, self.targets(query, *parameters)),
        }

    def sample_parameters(
        self, n: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Amplitudes, phases (radians) and frequencies of ``n`` tasks, each ``[n]``.

        They are the first thing that ``sample`` draws: from a generator in the same state, these
        are the curves behind its tasks.

        >>> sine, seed = Sine(), torch.Generator().manual_seed
        >>> x, y = sine.sample(3, generator=seed(0))["query"]
        >>> torch.equal(y, sine.targets(x, *sine.sample_parameters(3, seed(0))))
        True
        """
        amplitude = uniform(self.amplitude, (n,), self.dtype, generator)
        phase = uniform(self.phase, (n,), self.dtype, generator)
        low, high = self.frequency
        if low == high:  # not drawn, so that seeds give the tasks that they gave before the option
            return amplitude, phase, torch.full_like(amplitude, low)
        return amplitude, phase, uniform(self.frequency, (n,), self.dtype, generator)

    @staticmethod
    def targets(
        x: Float[Tensor, "n shots 1"],
        amplitude: Float[Tensor, " n"],
        phase: Float[Tensor, " n"],
        frequency: Float[Tensor, " n"],
        /,
    ) -> Float[Tensor, "n shots 1"]:
        """The curves of n tasks at their inputs: ``amplitude · sin(frequency · x + phase)``."""
        amplitude, phase, frequency = (
            parameter[:, None, None] for parameter in (amplitude, phase, frequency)
        )
        return amplitude * torch.sin(frequency * x + phase)

    def _grid(self, points: int, generator: torch.Generator) -> Float[Tensor, " points"]:
        return torch.linspace(*self.x_range, points, device=generator.device, dtype=self.dtype)


def uniform(
    interval: tuple[float, float],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """Uniform draws on the generator's device."""
    empty = torch.empty(shape, device=generator.device, dtype=dtype)
    return empty.uniform_(*interval, generator=generator)


def check_interval(name: str, interval: tuple[float, float], /) -> None:
    """Say in one sentence why this is no interval to draw from."""
    if len(interval) != 2 or not -math.inf < interval[0] <= interval[1] < math.inf:
        raise ValueError(
            f"expected {name} to be (low, high) with finite low <= high, found {interval!r}"
        )
