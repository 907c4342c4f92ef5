"""TaskBatch: measure and apply inside the user's own loop over the tasks of a meta-batch."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gradagree_opt.core.aggregation import Aggregator, check_aggregator
from gradagree_opt.core.diagnostics import check_some_task
from gradagree_opt.core.few_passes import measures_directions, weighted_loss_refusal
from gradagree_opt.core.header import TaskForm
from gradagree_opt.core.results import Aggregation, CollectedTasks
from gradagree_opt.core.shards import are_sharded, of_no_task, stack_tasks
from gradagree_opt.core.stacks import PyTree, is_coarse
from gradagree_opt.loops.adapted import (
    Parameters,
    advice_on_loss,
    check_of_adapted,
    displacement,
    match,
    named,
    trained,
)
from gradagree_opt.loops.graphs import check_depends, check_loss
from gradagree_opt.loops.loss_graph import LossGraph
from gradagree_opt.loops.multi_task import aggregate_losses
from gradagree_opt.loops.over_ranks import (
    Used,
    accumulated_gradient,
    check_ranks,
    task_of,
    unwrapped,
)
from gradagree_opt.options import check_choice


class _Task(NamedTuple):
    loss: Tensor | None  # detached, if its gradient was taken when the task was added
    copies: dict[str, Tensor]  # detached copies of parameters, whose gradients count for these
    displacement: dict[str, Tensor]  # θ − θ_i, if the weights read it
    gradient: dict[str, Tensor]  # if it was taken when the task was added
    used: set[str]  # names of the parameters that a pass has found a gradient of


class TaskBatch:
    """Collects the tasks of a meta-batch in a loop, then fills ``.grad`` with their aggregation.

    What is added decides what is weighted by what:

    - ``add(loss, adapted=learner)``, the MAML form: signal θ − θ_i, direction ∇L_i(θ_i).
    - ``add(adapted=learner)``, the Reptile form: signal and direction θ − θ_i.
    - ``add(loss)``, multi-task learning: signal and direction ∇L_i(θ).

    What an adapted learner shares with the module, or lacks, has not adapted: its displacement is
    zero, and its gradient is weighted like that of the rest (GBML's transforms, MetaSGD's rates,
    the body of ANIL). A learner of detached tensors has its gradient taken where it stands, which
    is first-order MAML (higher's ``track_higher_grads=False``).

    A parameter's hooks (``register_hook``) see the gradient of the weighted loss where one backward
    pass is shared, and that of each task where there is one for each. Hooks after accumulation
    (``register_post_accumulate_grad_hook``, as of an optimizer in the backward pass) run once, when
    the update is in ``.grad``.

    Args:
        parameters: module, named tensors or tensors whose ``.grad`` is to be filled; those that do
            not require a gradient are left alone. Every batch looks anew at the parameters of a
            module, a mapping or a list, as of a new head.
        aggregator: what weights the tasks; Equal Agreement does it by the direction in every form.
        memory: "graph" keeps the graphs of all losses until ``backward``, which then needs one
            backward pass in the MAML form, and few in multi-task learning where the losses share a
            graph; "stream" runs one backward pass at every ``add``, so that one task's graph is
            alive at a time, and keeps the gradients instead.

    Raises:
        TypeError: these are no parameters, or no aggregator.
        ValueError: no parameter requires a gradient, one is no leaf or occurs twice, or memory is
            neither "graph" nor "stream"; or several ranks train without ``ga.distributed``, or by
            a DistributedDataParallel that sends more than gradients.

    Source: Eshratifar et al. 2018, algorithm 1, both forms.

    >>> import gradagree_opt as ga
    >>> w = torch.tensor([0.0], requires_grad=True)
    >>> batch = ga.TaskBatch([w], ga.GradientAgreement())
    >>> for target in (1.0, 2.0, 3.0):
    ...     batch.add(((w - target) ** 2).mean())
    >>> result = batch.backward()
    >>> w.grad
    tensor([-4.6667])
    """

    def __init__(
        self,
        parameters: Parameters,
        aggregator: Aggregator,
        *,
        memory: Literal["graph", "stream"] = "graph",
    ) -> None:
        check_aggregator(aggregator)
        check_choice("memory", memory, ("graph", "stream"))
        parameters = unwrapped(parameters, aggregator)
        # A module may be given new parts between batches; an iterator can be read once.
        self._source = parameters if isinstance(parameters, nn.Module | Mapping | list) else None
        self._all = named(parameters)
        self._look_anew()
        if self._sharded:  # in the middle of a step FSDP shows others
            self._source = None
        check_ranks(self._trained, aggregator)
        self.aggregator = aggregator
        self.memory = memory
        self._form = TaskForm.UNKNOWN
        self._tasks: list[_Task] = []

    def __len__(self) -> int:
        """Number of tasks added since the last ``backward``."""
        return len(self._tasks)

    @property
    def takes_one_backward(self) -> bool:
        """Whether the tasks of the MAML form share one backward pass, that of the weighted loss."""
        return self.memory == "graph" and not (
            measures_directions(self.aggregator)
            or weighted_loss_refusal(self.aggregator) is not None
            or self.aggregator.scope != "global"  # a pass for each group, where n tasks are few
            or is_coarse([*self._trained.values(), *self._losses])  # it would add in their dtype
        )

    def add(self, loss: Tensor | None = None, /, *, adapted: Parameters | None = None) -> None:
        """Adds one task.

        Args:
            loss: scalar, differentiable in the parameters; absent in the Reptile form.
            adapted: the task's adapted parameters θ_i: a module, or tensors by name or in order.

        Raises:
            TypeError: ``adapted`` is neither a module nor tensors.
            ValueError: the loss is not a scalar, or does not depend on the parameters or on those
                adapted from them; ``adapted`` is no learner of the same model; or the form differs
                from that of earlier tasks, or is not add(loss) where parameters are sharded.
        """
        with task_of(self, self.aggregator):
            self._add(loss, adapted)

    def _add(self, loss: Tensor | None, adapted: Parameters | None) -> None:
        if loss is None and adapted is None:
            raise ValueError(
                "expected a loss, adapted parameters or both, found neither; call "
                "add(loss), add(adapted=…), or add(loss, adapted=…)"
            )
        form = TaskForm((loss is not None) + 2 * (adapted is not None))
        if len(self) and form != self._form:
            raise ValueError(
                f"expected every task of a batch in one form, found {form.call} after "
                f"{self._form.call}; call backward() first"
            )
        if not len(self):
            self._look_anew()
            check_ranks(self._trained, self.aggregator, adapts=adapted is not None)
        after = match(self._all, adapted) if adapted is not None else {}
        read = loss is None or not measures_directions(self.aggregator)
        moved = displacement(self._trained, after) if adapted is not None and read else {}
        copies = {} if loss is None else self._copies(loss, after)
        task = _Task(loss, copies, moved, {}, {*self._trained} if loss is None else set())
        if loss is not None and self.memory == "stream":
            gradient = self._gradient(loss, task, retain_graph=False)
            task = task._replace(loss=loss.detach(), copies={}, gradient=gradient)
        self._tasks.append(task)
        self._form = form

    def backward(self) -> CollectedTasks:
        """Adds Σ_i w_i · direction_i to ``.grad`` of every parameter; ready for the next batch.

        As with ``loss.backward()``, a parameter that no loss depends on keeps the ``.grad`` it has;
        losses of dropped tasks do not count. The graphs are freed: whatever else passes through
        them, as GradNorm does, comes before. The update is dense, that of a sparse embedding too,
        with which SparseAdam cannot step.

        Returns:
            The aggregation and the losses ``[n]``; its update is a dict by parameter name or place.

        Raises:
            ValueError: no task was added, a graph is stale, parameters have changed since, or tasks
                are refused or all dropped. No ``.grad`` is touched then; the tasks are forgotten.
        """
        if len(self) < self.aggregator.fewest:
            raise ValueError("expected at least one task, found an empty batch; call add() first")
        try:
            with self.aggregator.step_of_ranks(self, self._form):
                if not len(self):
                    self._look_anew()
                self._check_same_parameters()
                used = Used(self.aggregator, self._trained, [task.used for task in self._tasks])
                device = next(iter(self._trained.values())).device
                values = [loss.detach().to(device) for loss in self._losses]
                losses = torch.stack(values) if values else None
                result = self._aggregate(used, losses)
                self.aggregator.verify(result)
                check_some_task(result.diagnostics, self.aggregator.nonfinite)
                if not len(self):
                    losses = result.weights.new_zeros(0)
        finally:
            self.clear()
        used.add_to_grad(result)
        return CollectedTasks(*result, losses)

    def clear(self) -> None:
        """Forgets the tasks added so far, and their graphs."""
        self._tasks, self._form = [], TaskForm.UNKNOWN
        if self.aggregator.ranks is not None:
            self.aggregator.ranks.forget(self)

    def _look_anew(self) -> None:
        """Parameters may be replaced, frozen and unfrozen between batches."""
        self._all = self._found()
        self._trained = trained(self._all)
        self._sharded = are_sharded(self._trained)

    def _found(self) -> dict[str, Tensor]:
        """The parameters as they are now."""
        if self._source is None:
            return self._all
        found = named(self._source)
        own = nn.Parameter if isinstance(self._source, nn.Module) else Tensor
        # A model that adapts in place shows its adapted tensors, which are not what is trained.
        kept = all(isinstance(each, own) and each.is_leaf for each in found.values())
        return found if kept else self._all

    def _check_same_parameters(self) -> None:
        found = self._found()
        for name in dict.fromkeys([*self._all, *found]):
            same = (now := found.get(name)) is self._all.get(name)
            if not same or (now is not None and now.requires_grad != (name in self._trained)):
                change = "frozen or unfrozen" if same else "replaced, added or removed"
                raise ValueError(
                    f"expected the same parameters from the first task of a batch to backward(), "
                    f"found {name!r} {change}; change the model between batches"
                )

    @property
    def _losses(self) -> list[Tensor]:
        return [task.loss for task in self._tasks if task.loss is not None]

    def _copies(self, loss: Tensor, after: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The detached copies of parameters that a loss may come from; checks the loss."""
        advice = advice_on_loss(after, self._all)
        check_loss(loss, len(self), advice=advice)
        own = {n: t for n, t in after.items() if n in self._trained and t is not self._all[n]}
        own = {n: t for n, t in own.items() if t.requires_grad}
        # A module's own parameters are no copies: they may as well be those of another model.
        copies = {n: t for n, t in own.items() if t.is_leaf and not isinstance(t, nn.Parameter)}
        check_of_adapted(loss, list(own.values()), len(self))
        start = [*self._trained.values(), *copies.values()]
        if not self._sharded:  # FSDP computes with others
            check_depends(loss, start, len(self), advice=advice)
        return copies

    def _aggregate(self, used: Used, losses: Tensor | None) -> Aggregation:
        if not len(self):  # on one of several ranks
            return self.aggregator.aggregate_unchecked(of_no_task(self._trained))
        displacements = [task.displacement for task in self._tasks]
        signal = stack_tasks(displacements) if any(displacements) else None
        if losses is None:
            return self.aggregator.aggregate_unchecked(signal)
        nonfinite, gradients = ~torch.isfinite(losses), [task.gradient for task in self._tasks]
        if self.memory == "graph":
            copies = [task.copies for task in self._tasks]
            names = [task.used for task in self._tasks]
            graph = LossGraph(self._losses, self._trained, copies, used=names)
            result = self._from_few_passes(graph, signal, nonfinite)
            if result is not None:
                return result
            shared = graph.survey.shared  # compiled, a graph may be passed through once
            pairs = zip(self._losses, self._tasks, strict=True)
            gradients = [
                self._gradient(loss, task, retain_graph=shared and i < graph.n - 1)
                for i, (loss, task) in enumerate(pairs)
            ]
        stacked = stack_tasks(gradients)
        used.look_at(stacked, signal, nonfinite)
        return self.aggregator.aggregate_unchecked(stacked, signal, nonfinite=nonfinite)

    def _from_few_passes(
        self, graph: LossGraph, signal: PyTree, nonfinite: Tensor
    ) -> Aggregation | None:
        """The aggregation by passes that all tasks share; None where each is to have its own."""
        if signal is None:
            return aggregate_losses(graph, nonfinite, self.aggregator)
        if not self.takes_one_backward:
            return None
        like = of_no_task(self._trained)
        measured = self.aggregator.measure(signal, directions=like, nonfinite=nonfinite)
        return self.aggregator.apply(measured, graph.combined_for(self.aggregator))

    def _gradient(self, loss: Tensor, task: _Task, *, retain_graph: bool) -> dict[str, Tensor]:
        """Gradient by parameter, that of a detached copy counted for its parameter (FOMAML)."""
        if self._sharded:
            return accumulated_gradient(loss, self._trained, task.used, retain_graph=retain_graph)
        graph = LossGraph([loss], self._trained, [task.copies], used=[task.used])
        return graph.gradient(0, retain_graph=retain_graph)
