"""Runs of one method trained together, as one more vmapped axis of one program."""

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import gradagree_opt as ga
from gradagree_opt.ablation.section import Optimizer, StudyError
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.devices import CPU
from gradagree_opt.ablation.training.forms import Learner
from gradagree_opt.ablation.training.networks import Params
from gradagree_opt.ablation.training.optimizers import OPTIMIZERS, State
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.core.results import Aggregation
from gradagree_opt.core.stacks import PyTree
from gradagree_opt.engines.compilation import maybe_compiled

Result: TypeAlias = tuple[Params, State, Aggregation]

LARGEST_GROUP = 8
CACHE_BYTES = 2**20
"""Stacks of gradients in a processor's cache: up to there, more runs in a group are faster."""

COMPILED_ITERATIONS = 2000
"""Outer steps from which on the compilation takes less time than it saves."""


def groups(runs: list[Run], largest: int) -> list[list[Run]]:
    """The runs in groups of one method and of about the same size, those of TorchJD's one by one.

    The methods take turns: processes that start together compile different programs.
    """
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method.name, []).append(run)
    turns = zip_longest(
        *(
            even_parts(same, 1 if same[0].method.of_torchjd else largest)
            for same in by_method.values()
        )
    )
    return [group for turn in turns for group in turn if group]


def even_parts(runs: list[Run], largest: int) -> list[list[Run]]:
    """As few parts as can be, that differ by one run at most."""
    count = math.ceil(len(runs) / largest)
    bounds = [len(runs) * part // count for part in range(count + 1)]
    return [runs[start:end] for start, end in pairwise(bounds)]


def group_size(study: Study, module: nn.Module) -> int:
    """How many runs together are fastest, by the size of a run's stack of gradients."""
    stack = study.meta_batch * sum(p.numel() * p.element_size() for p in module.parameters())
    return max(1, min(LARGEST_GROUP, CACHE_BYTES // stack))


def is_compiled(study: Study) -> bool:
    """What the study says, or whether a training is long enough for its compilation."""
    if study.compile != "auto":
        return study.compile
    return study.iterations >= COMPILED_ITERATIONS


def compiler_failure() -> str | None:
    """Why torch.compile makes no program here, None where it does: a small one is made to find out.

    A compiler that is there may lack Python's headers, or fail in any other way.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    moment = time.time()  # a number that no program has which torch keeps from earlier
    try:
        get_cpp_compiler()
    except RuntimeError:
        return "none"
    try:
        maybe_compiled(lambda x: x * moment, True)(torch.ones(8))
    except Exception as error:  # it, or torch, may raise anything
        lines = str(error).splitlines() or [""]
        reason = next((line for line in reversed(lines) if "error:" in line), lines[0])
        return f"one that fails ({reason.strip() or type(error).__name__})"
    return None


def compiles(study: Study, warn: Callable[[str], None], device: torch.device = CPU) -> bool:
    """Whether the study is compiled; where it would be, the compiler is tried, in some seconds.

    On a GPU it is not: there its steps are captured, which takes no time and saves more.

    Args:
        warn: Called with one sentence where it goes on without a compiler.

    Raises:
        StudyError: It cannot be compiled and says ``compile: true``.
    """
    if device.type != "cpu" or not is_compiled(study):
        return False
    failure = compiler_failure()
    if failure is None:
        return True
    mend = "install one, as g++, with Python's headers"
    if study.compile is True:
        raise StudyError(
            f"compile: true needs a C++ compiler, found {failure}; {mend}, or give the study "
            "compile: false, which takes several times as long"
        )
    warn(
        f"compile: auto needs a C++ compiler, found {failure}; the study goes on without, which "
        f"takes several times as long, or {mend}"
    )
    return False


def stack(rows: list[PyTree]) -> PyTree:
    """Trees of one structure, every leaf with the runs as its first axis."""
    return tree_map(lambda *leaves: torch.stack(leaves), *rows)


def select(rows: PyTree, row: int) -> PyTree:
    """One of the rows that :func:`stack` has stacked."""
    return tree_map(lambda leaf: leaf[row], rows)


class StepInputs(NamedTuple):
    """What an outer step of a group of runs starts from, its leaves ``[runs, *shape]``.

    Attributes:
        params: Of the networks.
        state: Of the optimizer.
        rates: The outer rates.
        tasks: ``[runs, n, *shape]``.
        draws: The random numbers ``[runs, n]`` of a method that has some.
    """

    params: Params
    state: State
    rates: Tensor
    tasks: dict[str, tuple[Tensor, ...]]
    draws: Tensor | None


class OuterStep:
    """One outer step of a group of runs: each row computes what its run computes alone.

    Args:
        learner: What trains one run.
        optimizer: The outer optimizer of one run, by name.
        compiled: Whether the step is compiled, once for each method and size of group.
    """

    def __init__(self, learner: Learner, optimizer: Optimizer, compiled: bool) -> None:
        self.learner = learner
        self.optimizer = OPTIMIZERS[optimizer]
        self._step = maybe_compiled(self._all_rows, compiled)

    def initial(self, params: list[Params]) -> State:
        """The optimizer's state before the first step, from the parameters of each run."""
        state: State = stack([self.optimizer.initial(row) for row in params])
        return state

    def __call__(self, aggregator: ga.Aggregator, rows: StepInputs) -> Result:
        """New parameters, new state and the aggregations, their leaves ``[runs, *shape]``.

        Args:
            aggregator: Of the runs' method.
        """
        return self._step(aggregator, rows)

    def _all_rows(self, aggregator: ga.Aggregator, rows: StepInputs) -> Result:
        axes: list[Any] = [None if part is None else 0 for part in rows]
        in_dims = (StepInputs(*axes),)
        result: Result = torch.vmap(partial(self._row, aggregator), in_dims=in_dims)(rows)
        return result

    def alone(self, aggregator: ga.Aggregator, rows: StepInputs) -> Result:
        """The same of a single run, neither vmapped nor compiled: TorchJD allows neither."""
        row = StepInputs._make(None if part is None else select(part, 0) for part in rows)
        result: Result = stack([self._row(aggregator, row)])
        return result

    def _row(self, aggregator: ga.Aggregator, row: StepInputs) -> Result:
        if row.draws is not None:
            aggregator = aggregator.holding(row.draws)
        aggregation = self.learner.aggregate_unchecked(row.params, row.tasks, aggregator)
        params, state = self.optimizer.step(row.params, aggregation.update, row.state, row.rates)
        return params, state, aggregation
