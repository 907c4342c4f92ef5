"""What all runs of a study have in common: task distributions, network and meta-learners."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gradagree_opt.ablation.kinds.distributions import (
    Source,
    at_seed,
    data_tensors,
    distributions,
    draw,
)
from gradagree_opt.ablation.kinds.files import hashed
from gradagree_opt.ablation.kinds.kind import Kind
from gradagree_opt.ablation.section import Optimizer, StudyError
from gradagree_opt.ablation.study.sections import DRAWING, MAMLForm, MetaSGDForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.checkpoint import State
from gradagree_opt.ablation.training.devices import CPU
from gradagree_opt.ablation.training.forms import Learner, evaluator, learner
from gradagree_opt.ablation.training.grouping import OuterStep, is_compiled
from gradagree_opt.ablation.training.multi_task import MultiTask
from gradagree_opt.ablation.training.networks import (
    INPUTS_AT_ONCE,
    Criterion,
    Params,
    accuracy,
    apart_at_once,
    batch_loss,
    before_adaptation,
    build_module,
    criterion,
    generator,
    network_params,
    predict,
    predict_apart,
    with_network_params,
)
from gradagree_opt.ablation.training.optimizers import OPTIMIZERS
from gradagree_opt.core.measuring import measure
from gradagree_opt.tasks import Batch
from gradagree_opt.tasks.protocol import Split

Tasks: TypeAlias = dict[str, Batch]
TrainingBatch: TypeAlias = dict[str, tuple[Tensor, ...]]
"""Examples by part; the factor of a flipped task's displacement beside them."""
Drawn: TypeAlias = dict[tuple[int, int], tuple[TrainingBatch, tuple[Tensor, Tensor]]]
"""By seed and number of a block its tasks, and the states of the generators after it."""


@dataclass(frozen=True)
class Problem:
    """A study made ready to run.

    Attributes:
        tasks: The section of the study that they come from.
        training: Tasks that the meta-learner is trained on; :func:`at_seed` has those of a seed.
        evaluation: Tasks of the test protocol, drawn for validation and for the test; likewise.
        learner: What trains the network.
        outer_steps: Each trains a group of runs, by the outer optimizer that it steps with.
        evaluator: Adapts as the form does, each step on the whole support set.
        loss: What training lowers and what outer rates are chosen by.
        score: What the test reports: the loss in regression, the accuracy for classes.
        chunk_size: The most tasks that are adapted at once, None for all.
        transductive: Whether the examples of a query set are predicted as one batch.
        device: Where runs are trained and tested.
        data: What is given as ``--data``.
        drawn: Blocks of training tasks that several groups of runs on a GPU are about to read.
    """

    tasks: Kind
    training: Source
    evaluation: Source
    module: nn.Module
    learner: Learner
    outer_steps: dict[Optimizer, OuterStep]
    evaluator: Learner
    loss: Criterion
    score: Criterion
    chunk_size: int | None = None
    transductive: bool = True
    device: torch.device = CPU
    drawn: Drawn = field(default_factory=dict)
    data: Path | None = None


def build_problem(study: Study, data: Path | None, device: torch.device = CPU) -> Problem:
    module = build_module(study)
    loss = batch_loss(study, module)
    trainer = learner(study, loss, module)
    training, evaluation = distributions(study, data)
    return Problem(
        tasks=study.tasks,
        training=training,
        evaluation=evaluation,
        module=module,
        learner=trainer,
        outer_steps={
            optimizer: OuterStep(trainer, optimizer, is_compiled(study)) for optimizer in OPTIMIZERS
        },
        evaluator=evaluator(study, loss, module),
        loss=criterion(study),
        score=criterion(study) if study.classes is None else accuracy,
        chunk_size=tasks_at_once(study),
        transductive=study.test.transductive,
        device=device,
        data=data,
    )


def tasks_at_once(study: Study) -> int:
    """The most tasks of the test protocol that are adapted at once."""
    examples = study.test.support_shots * (study.way or 1)
    return max(1, INPUTS_AT_ONCE // (study.tasks.input_size * examples))


def data_digest(problem: Problem) -> str | None:
    """A hash of the data and of how they are split; None for tasks that are made up.

    Raises:
        StudyError: A file of the data cannot be read.
    """
    if not (tensors := data_tensors(problem.tasks, problem.training)):
        return None
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.flatten().numpy().data)  # no copy: photographs take a gigabyte
    if problem.tasks.drawn_alone and problem.data is not None:
        try:
            for part in hashed(problem.data):
                digest.update(part)
        except OSError as error:
            raise StudyError(f"--data {problem.data}: {error}") from None
    return digest.hexdigest()


class TrainingTasks:
    """Task batches for the outer steps, the same for every method and rate of a seed.

    Tasks are drawn many steps at a time, since a draw costs as much as a compiled outer step;
    photographs, which would take gigabytes, one step at a time. Where some tasks are flipped, each
    support set has the factor of its displacement beside its examples.

    They are drawn on the CPU whatever the device is: a seed has the same tasks on all of them.
    """

    BLOCK = 100

    def __init__(self, study: Study, problem: Problem, seed: int) -> None:
        self.seed, self.device, self.kept = seed, problem.device, problem.drawn
        self.distribution = at_seed(problem.training, seed)
        self.meta_batch = study.meta_batch
        scores_queries = isinstance(study.form, MAMLForm | MetaSGDForm)
        self.parts = ("support", "query") if scores_queries else ("support",)
        self.generator = generator(seed, "train")
        self.flip, self.fraction = study.flip, study.fraction
        self.flips = generator(seed, "flips")
        self.steps = self.BLOCK if study.tasks.input_size <= DRAWING else 1
        self.number = 0
        self.block: TrainingBatch = {}

    def __call__(self, iteration: int) -> TrainingBatch:
        """The tasks of an outer step; the steps are asked for one after the other."""
        position = iteration % self.steps
        if position == 0:
            self.block = self.draw()
        rows = slice(position * self.meta_batch, (position + 1) * self.meta_batch)
        return {part: tuple(leaf[rows] for leaf in batch) for part, batch in self.block.items()}

    def draw(self) -> TrainingBatch:
        """The tasks of the next steps, leaves ``[steps · n, *shape]``.

        Where groups on a GPU train side by side, the first draws for all; others take its place in
        the stream of random numbers too.
        """
        key = self.seed, self.number
        self.number += 1
        if key in self.kept:
            found, states = self.kept[key]
            self.generator.set_state(states[0])
            self.flips.set_state(states[1])
            return found
        block: TrainingBatch = tree_map(partial(pinned, device=self.device), self.draw_anew())
        if self.device.type != "cpu":
            self.kept[key] = block, (self.generator.get_state(), self.flips.get_state())
            for seed, number in list(self.kept):
                if seed == self.seed and number < self.number - 2:
                    del self.kept[seed, number]
        return block

    def saved(self) -> State:
        """Where the stream of blocks is, for :meth:`restore`."""
        generators = self.generator.get_state(), self.flips.get_state()
        return {"number": self.number, "generators": generators}

    def restore(self, state: State) -> None:
        """Goes on with the block that would have been drawn next."""
        self.number = state["number"]
        for each, saved in zip((self.generator, self.flips), state["generators"], strict=True):
            each.set_state(saved)

    def draw_anew(self) -> TrainingBatch:
        n_tasks = self.steps * self.meta_batch
        drawn = draw(self.distribution, n_tasks, "train", self.generator)
        block: TrainingBatch = {part: drawn[part] for part in self.parts}
        if self.flip is not None:
            spoilt = torch.rand(n_tasks, generator=self.flips) < self.fraction
            block["support"] += (torch.where(spoilt, self.flip, 1.0),)
        return block


def pinned(leaf: Tensor, device: torch.device) -> Tensor:
    """Where the leaf can be copied to the device from while the host goes on."""
    return leaf if device.type == "cpu" else leaf.pin_memory()


def evaluation_tasks(problem: Problem, n_tasks: int, split: Split, seed: int) -> Tasks:
    """The tasks of the test protocol for one seed, drawn on the CPU, brought to the device."""
    tasks = draw(at_seed(problem.evaluation, seed), n_tasks, split, generator(seed, split))
    placed: Tasks = tree_map(lambda leaf: leaf.to(problem.device), tasks)
    return placed


def scores_after(
    problem: Problem, judge: Criterion, params: Params, tasks: Tasks, steps: list[int]
) -> dict[int, Tensor]:
    """What the judge says of each task's query set after gradient steps on its support set.

    Returns:
        For each number of steps, one value per task ``[n]``.
    """
    n_tasks = len(tasks["support"][0])
    adapted = before_adaptation(params, n_tasks)
    done, scores = 0, {}
    for step in steps:
        if step > done:
            adapted = adapt(problem, adapted, tasks["support"], step - done)
        done = step
        with torch.no_grad():
            outputs = query_outputs(problem, adapted, tasks)
            scores[step] = torch.vmap(judge)(outputs, tasks["query"][1])
    return scores


def query_outputs(problem: Problem, params: Params, tasks: Tasks) -> Tensor:
    """The network's outputs for each task's query set, at task-stacked parameters.

    Returns:
        ``[n, query examples, …]``.
    """
    (support, _), (query, _) = tasks["support"], tasks["query"]
    if problem.transductive:
        each = torch.vmap(partial(predict, problem.module), chunk_size=problem.chunk_size)
        return each(params, query)
    chunk_size = max(1, apart_at_once(support[0]) // query.shape[1])
    each = torch.vmap(partial(predict_apart, problem.module), chunk_size=chunk_size)
    return each(params, support, query)


def adapt(problem: Problem, params: Params, support: Batch, steps: int) -> Params:
    """Task-stacked parameters after further gradient steps on each task's own support set."""
    each = torch.vmap(partial(problem.evaluator.adapt, steps=steps), chunk_size=problem.chunk_size)
    return with_network_params(params, each(params, support))


def agreement_matrix(problem: Problem, params: Params, support: tuple[Tensor, ...]) -> Tensor:
    """Cosines ``[n, n]`` between the displacements of n tasks; 0 for one that did not move.

    In multi-task training, between their gradients in the trunk.
    """
    learner = problem.learner
    if isinstance(learner, MultiTask):
        signals, _ = learner.gradients(params, support)
    else:
        inner_loop = partial(learner.adapt, params)
        adapted = torch.vmap(inner_loop, chunk_size=problem.chunk_size)(support)
        signals = tree_map(torch.sub, network_params(params), adapted)
    active = torch.ones(len(support[0]), dtype=torch.bool, device=support[0].device)
    cosines = measure(tree_leaves(signals), active, frozenset({"cosines"})).cosines
    assert cosines is not None
    return cosines
