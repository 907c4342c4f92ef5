"""Gradients of n tasks and their aggregation in one call."""

from collections.abc import Hashable
from functools import lru_cache

from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.header import TaskForm
from gradagree_opt.core.stacks import PyTree, check_floating, task_count
from gradagree_opt.engines.candidates import EngineName
from gradagree_opt.engines.choice import AggregatedGradients, Runner
from gradagree_opt.engines.losses import LossFn, Randomness, TaskLoss, TaskMap
from gradagree_opt.engines.meant import naming_what_was_meant
from gradagree_opt.options import check_choice


def aggregate_gradients(
    loss_fn: LossFn,
    params: PyTree,
    tasks: PyTree,
    aggregator: Aggregator,
    /,
    *,
    engine: EngineName = "auto",
    chunk_size: int | None = None,
    randomness: Randomness = "error",
    compile: bool = False,
) -> AggregatedGradients:
    """Per-task gradients and their aggregation: multi-task learning without a loop.

    | engine | extra memory | cost | model |
    |---|---|---|---|
    | "stacked" | n · d | one vmapped backward pass | what vmap and grad of torch.func run |
    | "matrix_free" | d | two backward passes, one Jacobian-vector product | the same, and forward \
mode or a second derivative |
    | "streamed" | d | three backward passes a task, one task after the other | every; its \
buffers, as BatchNorm's running statistics, end as of one pass |

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar`` of one task.
        params: pytree of floating-point tensors, shared by the tasks.
        tasks: the batch of every task, a pytree with leaves ``[n, *shape]``.
        aggregator: what weights the tasks; signal and direction are both the gradient.
        engine: one of the table; "auto" takes "matrix_free" where n · d is large, "stacked" where
            it is not, and the next in turn where the model or the aggregator does not allow it.
        chunk_size: tasks per vmap; None for all at once, 1 for no vmap.
        randomness: of dropout and the like under vmap, as in ``torch.func.vmap``.
        compile: torch.compile the engine, once for each loss function: give the same function
            object at every step, not a lambda made anew. "auto" then leaves out "streamed".

    Returns:
        The aggregation with ``losses`` ``[n]`` and the name of the ``engine`` that ran, all of it
        constants of differentiation.

    Raises:
        ValueError, TypeError: as :func:`task_gradients` (under "streamed" a model may change its
            buffers) and :meth:`Aggregator.aggregate`; or the engine cannot serve the aggregator,
            or several ranks train.
        RuntimeError: the engine cannot run the model, or memory does not suffice.

    >>> import torch
    >>> import gradagree_opt as ga
    >>> loss_fn = lambda w, x: ((w - x) ** 2).mean()
    >>> tasks = torch.tensor([[1.0], [2.0], [3.0]])
    >>> result = ga.aggregate_gradients(loss_fn, torch.tensor(0.0), tasks, ga.GradientAgreement())
    >>> result.update, result.engine
    (tensor(-4.6667), 'stacked')
    """
    check_aggregator(aggregator)
    with aggregator.step_of_ranks(form=TaskForm.LOSSES):
        check_floating(params, "parameters")
        check_choice("compile", compile, (True, False))
        make = _compiled_runner if compile else _runner
        if compile and not isinstance(loss_fn, Hashable):
            raise TypeError(
                "expected a loss_fn that is known again at the next step, found an object of "
                f"{type(loss_fn).__name__}, which cannot be hashed; give it to "
                "dataclass(eq=False), or take a function"
            )
        n = task_count(tasks, "tasks", least=aggregator.fewest)
        run = make(loss_fn, engine, chunk_size, randomness, compile)
        with naming_what_was_meant(loss_fn, params, tasks, loss_fn):
            return run(params, tasks, n, aggregator)


def _runner(
    loss_fn: LossFn,
    engine: EngineName,
    chunk_size: int | None,
    randomness: Randomness,
    compile: bool,
) -> Runner:
    task_map = TaskMap(chunk_size, randomness, loss_fn)
    return Runner(TaskLoss.plain(loss_fn, task_map), engine, compile)


_compiled_runner = lru_cache(maxsize=16)(_runner)
