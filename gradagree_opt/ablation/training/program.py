"""The outer steps of a group of runs, over tensors that stay where they are."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga
from gradagree_opt.ablation.own import told
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.captured import NotCapturedError, captured
from gradagree_opt.ablation.training.checkpoint import State
from gradagree_opt.ablation.training.grouping import StepInputs, stack
from gradagree_opt.ablation.training.networks import Params, generator
from gradagree_opt.ablation.training.problem import Problem, TrainingTasks, pinned
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.core.diagnostics import Diagnostics
from gradagree_opt.core.pipeline import without_diagnostics

Tell = Callable[[str], None]


class Block(NamedTuple):
    """What the outer steps of a block read.

    Attributes:
        tasks: Of every seed, ``[seeds, steps · n, *shape]``.
        rates: The outer rates ``[steps, runs]``.
        draws: The random numbers ``[steps, runs, n]`` of a method that has some.
    """

    tasks: dict[str, tuple[Tensor, ...]]
    rates: Tensor
    draws: Tensor | None


class Program:
    """Trains runs of one method step by step; on a GPU a step is one CUDA graph.

    What the steps read is brought to the device a block of steps at a time, and each finds its own
    by a count that is on the device too.

    Args:
        initial: The parameters of each run.
        tell: Called with one sentence where a step on a GPU cannot be captured.

    Attributes:
        done: Outer steps.
        params: After them, leaves ``[runs, *shape]``; the next step changes them in place.
        state: Of the optimizer, likewise.
        diagnostics: Of the last step that :meth:`advance` did.
    """

    diagnostics: Diagnostics

    def __init__(
        self,
        study: Study,
        problem: Problem,
        runs: Sequence[Run],
        initial: Sequence[Params],
        tell: Tell,
    ) -> None:
        self.study, self.device, self.tell = study, problem.device, tell
        self.method = runs[0].method
        seeds = list(dict.fromkeys(run.seed for run in runs))
        self.sources = [TrainingTasks(study, problem, seed) for seed in seeds]
        self.aggregators = [run.method.build(generator(run.seed, "weights")) for run in runs]
        self.rates = torch.tensor([run.rate for run in runs])
        outer_step = problem.outer_steps[study.optimizer(self.method)]
        self.step = outer_step.alone if self.method.of_torchjd else outer_step
        place = partial(tree_map, lambda leaf: leaf.to(self.device))
        self.params: Params = place(stack(list(initial)))
        self.state = place(outer_step.initial(list(initial)))
        self.block_steps = self.sources[0].steps
        first = [seeds.index(run.seed) * self.block_steps for run in runs]
        self.first = torch.tensor(first, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.block: Block | None = None
        self.done = 0
        self._steps: dict[bool, Callable[[], None]] = {}

    @property
    def block_end(self) -> int:
        """The step that the block of the next one leads up to."""
        end = (self.done // self.block_steps + 1) * self.block_steps
        return min(end, self.study.iterations)

    @property
    def at_end_of_block(self) -> bool:
        return self.done % self.block_steps == 0

    @property
    def changing(self) -> list[Tensor]:
        """What a step writes and the next one reads."""
        return [*tree_leaves([self.params, self.state]), self.position]

    def advance(self, upto: int) -> None:
        """Does the outer steps up to a number of them, not beyond the end of the block.

        Raises:
            StudyError: A method, a network or tasks that are not this library's raise anything.
        """
        if self.at_end_of_block:
            self.load()
        try:
            self.do_steps(upto)
        except Exception as error:
            if not self.method.of_torchjd and not self.study.references(self.method):
                raise
            raise StudyError(
                f"the method {self.method.name!r}: expected an update in each of the outer steps "
                f"{self.done + 1} to {upto}, found {told(error)}; see whether the gradients of "
                "tasks are zero there, or leave the method out"
            ) from error
        self.done = upto

    def do_steps(self, upto: int) -> None:
        if not self._steps:
            self.make_steps()
        for _ in range(self.done, upto - 1):
            self._steps[False]()
        self._steps[True]()

    def make_steps(self) -> None:
        """The step, by whether its diagnostics are read: on a GPU, those before it go without."""
        aggregator = self.aggregators[0]
        described = partial(self.outer_step, aggregator)
        self._steps = {True: described, False: described}
        if self.device.type == "cpu" or self.method.of_torchjd:  # which solves on the host
            return
        quiet = partial(self.outer_step, without_diagnostics(aggregator))
        for step, function in ((False, quiet), (True, described)):
            try:
                self._steps[step] = captured(function, self.changing)
            except NotCapturedError as failure:
                self.tell(
                    f"the outer steps of {self.method.name!r} cannot be one CUDA graph and are "
                    f"done operation by operation, which takes longer: {failure}"
                )
                return

    def release(self) -> None:
        """Gives the graphs and their memory back; no step comes after it."""
        self._steps.clear()
        self.block = None

    def outer_step(self, aggregator: ga.Aggregator) -> None:
        assert self.block is not None
        at = self.first + self.position
        n = self.study.meta_batch
        tasks: Any = tree_map(
            lambda leaf: leaf.view(-1, n, *leaf.shape[2:]).index_select(0, at), self.block.tasks
        )
        rates = self.block.rates.index_select(0, self.position).squeeze(0)
        draws = self.block.draws
        if draws is not None:
            draws = draws.index_select(0, self.position).squeeze(0)
        rows = StepInputs(self.params, self.state, rates, tasks, draws)
        params, state, aggregation = self.step(aggregator, rows)
        torch._foreach_copy_(tree_leaves([self.params, self.state]), tree_leaves([params, state]))
        self.diagnostics = aggregation.diagnostics
        self.position += 1

    def saved(self) -> State:
        """What :meth:`restore` goes on from; for a program at the end of a block."""
        return {
            "done": self.done,
            "changing": [leaf.cpu() for leaf in self.changing],
            "sources": [source.saved() for source in self.sources],
            "generators": [
                each.generator and each.generator.get_state() for each in self.aggregators
            ],
        }

    def restore(self, state: State) -> None:
        """Becomes the program that was saved, to the bit."""
        self.done = state["done"]
        for leaf, saved in zip(self.changing, state["changing"], strict=True):
            leaf.copy_(saved)
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.restore(saved)
        for each, saved in zip(self.aggregators, state["generators"], strict=True):
            if each.generator is not None:
                each.generator.set_state(saved)

    def load(self) -> None:
        """Brings the next block to the device, which does not wait for it."""
        drawn = [source.draw() for source in self.sources]
        steps = range(self.done, self.done + self.block_steps)
        linear = self.study.outer.schedule == "linear"
        left = [1 - step / self.study.iterations if linear else 1.0 for step in steps]
        rates = torch.tensor(left).unsqueeze(1) * self.rates
        draws = self.draw()
        if self.block is None:
            empty = partial(torch.empty_like, device=self.device)
            self.block = Block(
                tree_map(lambda leaf: empty(leaf.expand(len(drawn), *leaf.shape)), drawn[0]),
                empty(rates),
                None if draws is None else empty(draws),
            )
        for index, tasks in enumerate(drawn):
            for buffer, leaf in zip(tree_leaves(self.block.tasks), tree_leaves(tasks), strict=True):
                buffer[index].copy_(leaf, non_blocking=True)
        for buffer, fresh in ((self.block.rates, rates), (self.block.draws, draws)):
            if buffer is not None and fresh is not None:
                buffer.copy_(pinned(fresh, self.device), non_blocking=True)
        self.position.zero_()

    def draw(self) -> Tensor | None:
        """The random numbers of the next block, as each run draws them alone."""
        if "draws" not in self.aggregators[0].needs:
            return None
        n = self.study.meta_batch
        drawn: Tensor = stack(
            [stack([each.draw(n) for each in self.aggregators]) for _ in range(self.block_steps)]
        )
        return drawn
