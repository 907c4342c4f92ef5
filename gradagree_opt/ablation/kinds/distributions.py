"""The task distributions of a study: what its section of tasks, and of corruption, stand for."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradagree_opt.ablation.kinds import grouped
from gradagree_opt.ablation.kinds.grouped import measured, measurements
from gradagree_opt.ablation.kinds.kind import Kind, Pair
from gradagree_opt.ablation.own import told
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.sections import CorruptionSection
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.tasks import Corrupted, GroupedRegression, Lines, Sine, TaskDistribution
from gradagree_opt.tasks.grouped import Dataset
from gradagree_opt.tasks.protocol import Batch, Split

SOURCES = grouped.SOURCES | {"lines": "[@finn2018probabilistic]"}
"""Whose foreign tasks are, for the methods text."""


@dataclass(frozen=True)
class Folds:
    """The distributions of a cross-validation: a seed has the one of its fold."""

    distributions: tuple[TaskDistribution, ...]


Source: TypeAlias = TaskDistribution | Folds
"""What the tasks of all seeds come from."""


def at_seed(source: Source, seed: int) -> TaskDistribution:
    """What the tasks of one seed come from."""
    if isinstance(source, Folds):
        return source.distributions[seed % len(source.distributions)]
    return source


def distributions(study: Study, data: Path | None) -> tuple[Source, Source]:
    """The tasks of the training, and those of the test protocol; a task of each split is drawn.

    Raises:
        StudyError: The data is absent, not in the expected form, too small, or not wanted; or the
            package that has it is not installed.
    """
    pairs = [checked(study, *pair) for pair in study.tasks.build_folds(study.test, data)]
    if len(pairs) == 1:
        return pairs[0]
    training, evaluation = zip(*pairs, strict=True)
    return Folds(training), Folds(evaluation)


def checked(study: Study, training: TaskDistribution, evaluation: TaskDistribution) -> Pair:
    """The two, tasks of which are as the study says, those of the training corrupted."""
    check_task(study, training, "train")
    check_task(study, evaluation, "validation")
    check_task(study, evaluation, "test")
    if study.corruption is not None:
        training = corrupted(study, study.corruption, training)
    return training, evaluation


def check_task(study: Study, distribution: TaskDistribution, split: Split) -> None:
    """Say in one sentence why no task of a split can be drawn, or why one is not of the study."""
    shots = study.tasks if split == "train" else study.test
    try:
        tasks = distribution.sample(1, split=split, generator=torch.Generator().manual_seed(0))
        parts = [(part, *check_batch(tasks[part])) for part in ("support", "query")]
    except Exception as error:  # it may be the user's, and raise anything
        classes = f" of {study.way} classes" if study.way else ""
        raise StudyError(
            f"no {split} task{classes} with {shots.support_shots} support and {shots.query_shots} "
            f"query examples{' each' if classes else ''} can be drawn: {told(error)}"
        ) from None
    for part, x, y in parts:
        each = shots.support_shots if part == "support" else shots.query_shots
        try:
            check_examples(study, x, y, each)
        except ValueError as error:
            raise StudyError(f"the {part} examples of a {split} task: {error}") from None


def draw(
    distribution: TaskDistribution, n_tasks: int, split: Split, generator: torch.Generator
) -> dict[str, Batch]:
    """So many tasks of a split.

    Raises:
        StudyError: The user's code raises anything, or a number is not finite: as a loss it would
            look like that of a method that diverges.
    """
    try:
        tasks = distribution.sample(n_tasks, split=split, generator=generator)
    except Exception as error:  # as above
        raise StudyError(f"{n_tasks} {split} tasks cannot be drawn: {told(error)}") from None
    for part, batch in tasks.items():
        for name, leaf in zip(("inputs", "targets"), batch, strict=True):
            if (finite := leaf.isfinite()).all():
                continue
            bad = (~finite).flatten(1).any(1).sum()
            raise StudyError(
                f"the {part} {name} of {split} tasks: expected finite numbers, found "
                f"{leaf[~finite][0].item()} in {bad} of {n_tasks} tasks; correct the data, or what "
                "draws or corrupts the tasks"
            )
    return tasks


def check_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """The inputs and targets of one task, or a ValueError."""
    match batch:
        case (Tensor(ndim=n_x, dtype=dtype) as x, Tensor(ndim=n_y) as y) if min(n_x, n_y) > 1:
            if len(x) == len(y) == 1 and dtype == torch.float32:
                return x, y
    found = [
        (list(each.shape), each.dtype) for each in tree_leaves(batch) if hasattr(each, "shape")
    ]
    raise ValueError(
        f"expected inputs and targets [1, examples, …], inputs as torch.float32, found {found}"
    )


def check_examples(study: Study, x: Tensor, y: Tensor, shots: int) -> None:
    """Raises a ValueError unless these are the examples of one task as the study describes it."""
    numbers, shape = study.tasks.input_size, list(x.shape[2:])
    if math.prod(shape) != numbers:
        inputs = math.prod(shape)
        raise ValueError(
            f"expected {numbers} numbers in each, found {inputs}; give inputs: {inputs}"
        )
    channels = study.tasks.channels
    side = math.isqrt(numbers // channels)
    if study.model.kind == "conv4" and shape != [channels, side, side]:
        raise ValueError(f"expected shape {[channels, side, side]} for conv4, found {shape}")
    if study.way is None:
        if y.shape[1] != shots:
            raise ValueError(f"expected {shots}, found {y.shape[1]}")
        if study.classes is None and list(y.shape[2:]) != [study.outputs]:
            shape = list(y.shape[2:])
            raise ValueError(f"expected targets of shape {[study.outputs]} each, found {shape}")
        return
    if y.dtype != torch.int64:
        raise ValueError(f"expected classes as torch.int64, found {y.dtype}")
    labels, counts = torch.unique(y, return_counts=True)
    if labels.tolist() != list(range(study.way)):
        raise ValueError(f"expected classes 0 to {study.way - 1}, found {labels.tolist()}")
    if (counts != shots).any():
        raise ValueError(f"expected {shots} of each class, found {counts.tolist()}")


def corrupted(
    study: Study, corruption: CorruptionSection, training: TaskDistribution
) -> TaskDistribution:
    if corruption.kind == "flipped":  # its examples stay as they are
        return training
    spoilt = Corrupted(
        training,
        kind=corruption.kind,
        fraction=study.fraction,
        scale=1.0 if corruption.scale is None else corruption.scale,
        foreign=foreign_tasks(study, corruption.foreign, training),
    )
    check_task(study, spoilt, "train")
    return spoilt


def foreign_tasks(
    study: Study, name: Literal["lines", "fast_sines"] | Dataset | None, training: TaskDistribution
) -> TaskDistribution | None:
    """Tasks of another kind with the shots of the study's own."""
    if name is None:
        return None
    support_shots, query_shots = study.tasks.support_shots, study.tasks.query_shots
    inputs = training
    if not isinstance(inputs, Sine):
        inputs = Sine(support_shots=support_shots, query_shots=query_shots)
    match name:
        case "lines":
            return Lines(inputs=inputs)
        case "fast_sines":
            return fast_sines(inputs)
        case _:
            return measurements(name, support_shots, query_shots)


def fast_sines(inputs: Sine) -> Sine:
    """Higher and faster sines than any of a study, at the inputs of another distribution."""
    return replace(inputs, amplitude=(5.0, 15.0), phase=(0.0, 2 * math.pi), frequency=(3.0, 6.0))


def data_tensors(tasks: Kind, source: Source) -> list[Tensor]:
    """What tasks are drawn from, its parts in a fixed order."""
    match source:
        case Folds(distributions=each):
            return [tensor for fold in each for tensor in data_tensors(tasks, fold)]
        case Corrupted(base=base, foreign=foreign):
            own = data_tensors(tasks, base)
            return own + (measured(foreign) if isinstance(foreign, GroupedRegression) else [])
        case _:
            return tasks.data(source)
