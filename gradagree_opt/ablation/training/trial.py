"""A trial before a study is trained: whether its tasks and the loss after adaptation are finite."""

import math

import torch
from torch.utils._pytree import tree_map

from gradagree_opt.ablation.own import told
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.sections import OwnModel
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.devices import memory_of
from gradagree_opt.ablation.training.networks import before_adaptation, build_module, initial_params
from gradagree_opt.ablation.training.problem import (
    Problem,
    Tasks,
    TrainingTasks,
    evaluation_tasks,
    query_outputs,
    scores_after,
)
from gradagree_opt.ablation.training.scoring import check_untrained


def check_memory(study: Study, device: torch.device) -> None:
    """Refuses a network that the device cannot hold, before any of it is allocated.

    Raises:
        StudyError: The parameters of the tasks that a test adapts to are more than its memory. A
            network of the user's own is not known before it is made.
    """
    memory = memory_of(device)
    if memory is None or isinstance(study.model, OwnModel):
        return
    try:
        with torch.device("meta"):
            numbers: float = sum(leaf.numel() for leaf in build_module(study).parameters())
    except RuntimeError:  # of a layer with more than torch can count
        numbers = math.inf
    adapted = 1
    if study.adapts and study.form.kind != "anil":  # whose body is that of all tasks
        tuned, tested = bool(study.tuning.steps), any(study.test.steps)
        adapted += max(study.tuning.tasks * tuned, study.test.tasks * tested)
    if (needed := 4 * numbers * adapted) > memory:
        raise StudyError(
            f"expected a study that fits into memory, found a network of {numbers:.3g} parameters, "
            f"which takes {needed / 2**30:.3g} GiB of {memory / 2**30:.3g} (its own and those of "
            f"{adapted - 1} adapted tasks of a test); give it a smaller network or fewer tasks"
        )


def try_problem(study: Study, problem: Problem) -> None:
    """Draws what the first of its runs draws, and adapts as the test does.

    Raises:
        StudyError: Tasks are not finite; or the network is no function of a batch, cannot be
            vmapped, raises anything, or has a loss that is not finite.
    """
    own = study.tasks.drawn_alone or study.references()
    if not own and study.corruption is None:  # those of the library are checked where they are read
        return
    seed, n_tasks = study.tuning_seeds[0], min(study.meta_batch, study.tuning.tasks)
    TrainingTasks(study, problem, seed).draw_anew()
    evaluation_tasks(problem, study.test.tasks, "test", seed)
    drawn = evaluation_tasks(problem, study.tuning.tasks, "validation", seed)
    # A few of them: the first run adapts to all, and is checked before it trains.
    tasks: Tasks = tree_map(lambda leaf: leaf[:n_tasks], drawn)
    params = initial_params(study, seed)
    name = getattr(study.model, "make", study.model.kind)
    try:
        outputs = query_outputs(problem, before_adaptation(params, n_tasks), tasks)
        expected = [*tasks["query"][0].shape[:2], study.outputs]
        if list(outputs.shape) != expected:
            raise ValueError(f"expected outputs {expected[1:]}, found {list(outputs.shape[1:])}")
        steps = sorted({1, study.tuning.steps})
        losses = scores_after(problem, problem.loss, params, tasks, steps)
    except Exception as error:  # as much as the user's code may raise
        raise StudyError(f"the model {name} on a task of the study: {told(error)}") from None
    for step, values in losses.items():
        check_untrained(float(values.mean()), step, seed)
