"""TaskBatch: measure and apply inside the user's own loop over the tasks of a meta-batch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from gradagree_opt.aggregation import Aggregation, Aggregator
from gradagree_opt.stacks import PyTree
from gradagree_opt.weightings import check_choice

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
"""A module, or its parameters by name or in order."""


class TaskBatch:
    """Collects the tasks of a meta-batch in a loop, then fills ``.grad`` with their aggregation.

    What is added decides what is weighted by what:

    - ``add(loss, adapted=learner)``, the MAML form: signal θ − θ_i, direction ∇L_i(θ_i).
    - ``add(adapted=learner)``, the Reptile form: signal and direction θ − θ_i.
    - ``add(loss)``, multi-task learning: signal and direction ∇L_i(θ).

    Args:
        parameters: module, named tensors or tensors whose ``.grad`` is to be filled; those that do
            not require a gradient are left alone.
        aggregator: what weights the tasks.
        memory: "graph" keeps the graphs of all losses until ``backward``, which then needs one
            backward pass in the MAML form; "stream" runs one backward pass at every ``add``, so
            that one task's graph is alive at a time, and keeps the gradients instead.

    Raises:
        ValueError: no parameter requires a gradient, or memory is neither "graph" nor "stream".

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
        check_choice("memory", memory, ("graph", "stream"))
        self._all = _named(parameters)
        self._trained = {name: p for name, p in self._all.items() if p.requires_grad}
        if not self._trained:
            raise ValueError(
                f"expected parameters of which at least one requires a gradient, found "
                f"{len(self._all)} that do not; call requires_grad_() on those to train"
            )
        self.aggregator = aggregator
        self.memory = memory
        self._losses: list[Tensor] = []
        self._directions: list[dict[str, Tensor]] = []
        self._displacements: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        """Number of tasks added since the last ``backward``."""
        return max(len(self._losses), len(self._directions), len(self._displacements))

    def add(self, loss: Tensor | None = None, /, *, adapted: Parameters | None = None) -> None:
        """Adds one task.

        Args:
            loss: scalar, differentiable in the parameters; absent in the Reptile form.
            adapted: the task's adapted parameters θ_i: a module, or tensors by name or in order.

        Raises:
            ValueError: the loss is not a scalar or does not depend on the parameters; ``adapted``
                does not match the parameters; or the form differs from that of earlier tasks.
        """
        if loss is None and adapted is None:
            raise ValueError("expected a loss, adapted parameters or both, found neither")
        form = (loss is not None, adapted is not None)
        if len(self) and form != self._form:
            raise ValueError(
                f"expected every task of a batch in one form, found add{_call(form)} after "
                f"add{_call(self._form)}; call backward() first"
            )
        if loss is not None:
            _check_loss(loss)
        displacement = self._displacement(adapted) if adapted is not None else None
        if loss is not None and self.memory == "stream":
            self._directions.append(self._gradient(loss, retain_graph=False))
        elif loss is not None:
            self._losses.append(loss)
        if displacement is not None:
            self._displacements.append(displacement)

    def backward(self) -> Aggregation:
        """Adds Σ_i w_i · direction_i to ``.grad`` of every parameter; ready for the next batch.

        Returns:
            The aggregation; its update is a dict from parameter name (or position) to gradient.

        Raises:
            ValueError: no task was added, a loss does not depend on the parameters, or the
                aggregator refuses the tasks. No ``.grad`` is touched then.
        """
        if not len(self):
            raise ValueError("expected at least one task, found an empty batch; call add() first")
        result = self._aggregate()
        self.aggregator.verify(result)
        for name, parameter in self._trained.items():
            update = result.update[name]
            parameter.grad = update if parameter.grad is None else parameter.grad + update
        self.clear()
        return result

    def clear(self) -> None:
        """Forgets the tasks added so far, and their graphs."""
        self._losses.clear()
        self._directions.clear()
        self._displacements.clear()

    @property
    def _form(self) -> tuple[bool, bool]:
        return bool(self._losses or self._directions), bool(self._displacements)

    def _aggregate(self) -> Aggregation:
        signal = _stack(self._displacements) if self._displacements else None
        one_backward = self._losses and signal is not None
        # A dropped task must not reach a shared backward pass: 0 · NaN is NaN there.
        if one_backward and self.aggregator.nonfinite != "drop":
            return self._from_one_backward(signal)
        directions = self._directions or [
            self._gradient(loss, retain_graph=True) for loss in self._losses
        ]
        if not directions:
            return self.aggregator.aggregate_unchecked(signal)
        return self.aggregator.aggregate_unchecked(_stack(directions), signal)

    def _from_one_backward(self, signal: PyTree) -> Aggregation:
        losses = torch.stack(self._losses)

        def weighted(weights: Tensor, groups: list[int] | None) -> PyTree:
            if groups is None:
                return self._gradient(losses @ weights.to(losses), retain_graph=True)
            each = [self._gradient(losses @ row.to(losses), retain_graph=True) for row in weights]
            names = enumerate(self._trained)
            return {name: each[groups[index]][name] for index, name in names}

        measured = self.aggregator.measure(signal, nonfinite=~torch.isfinite(losses.detach()))
        return self.aggregator.apply(measured, weighted, signal_is_direction=False)

    def _gradient(self, loss: Tensor, *, retain_graph: bool) -> dict[str, Tensor]:
        parameters = list(self._trained.values())
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            loss, parameters, retain_graph=retain_graph, allow_unused=True
        )
        if all(grad is None for grad in grads):
            raise ValueError(
                "expected a loss that depends on the parameters, found none that does; "
                "adapt from the parameters that TaskBatch was given"
            )
        return {
            name: torch.zeros_like(parameter) if grad is None else grad.detach()
            for (name, parameter), grad in zip(self._trained.items(), grads, strict=True)
        }

    def _displacement(self, adapted: Parameters) -> dict[str, Tensor]:
        after = _named(adapted)
        if len(after) != len(self._all):
            raise ValueError(
                f"expected adapted parameters for the {len(self._all)} of the batch, found "
                f"{len(after)}; pass the learner adapted from the same model"
            )
        displacement = {}
        for (name, before), moved in zip(self._all.items(), after.values(), strict=True):
            if before.shape != moved.shape:
                raise ValueError(
                    f"expected adapted parameters of the same shapes, found {list(moved.shape)} "
                    f"for {name!r} of shape {list(before.shape)}; pass the learner adapted from "
                    "the same model, its parameters in the same order"
                )
            if name in self._trained:
                displacement[name] = (before - moved).detach()
        return displacement


def _named(parameters: Parameters) -> dict[str, Tensor]:
    """Parameters by name, or by position where they have none."""
    if isinstance(parameters, nn.Module):
        return dict(parameters.named_parameters())
    if isinstance(parameters, Mapping):
        return dict(parameters)
    tensors = list(parameters)
    for index, tensor in enumerate(cast(list[object], tensors)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected a module or tensors, found {type(tensor).__name__} at position {index}; "
                "pass model or model.parameters()"
            )
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def _stack(tasks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"expected a scalar loss, found {found}; reduce it, as in loss.mean()")
    if not loss.requires_grad:
        raise ValueError(
            "expected a loss with a graph, found one that requires no gradient; "
            "compute it outside torch.no_grad() from the adapted parameters"
        )


def _call(form: tuple[bool, bool]) -> str:
    parts = [name for name, there in zip(("loss", "adapted=…"), form, strict=True) if there]
    return f"({', '.join(parts)})"
