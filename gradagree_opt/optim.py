"""TaskOptimizer: an optimizer that steps on a vector of task losses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradagree_opt.aggregation import Aggregation, Aggregator
from gradagree_opt.annotations import Float
from gradagree_opt.collect import TaskBatch


class TaskOptimizer:
    """Wraps an optimizer: ``step(losses)`` aggregates the gradients of n task losses, then steps.

    Everything else (``zero_grad``, ``state_dict``, ``param_groups``) is the wrapped optimizer's;
    a learning-rate scheduler is given that one. As with ``backward``, the update is added to a
    ``.grad`` that is already there.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or one with its ``param_groups`` and ``step()``.
        aggregator: what weights the tasks; signal and direction are both the loss gradient.

    >>> import gradagree_opt as ga
    >>> w = torch.tensor([0.0], requires_grad=True)
    >>> optimizer = ga.TaskOptimizer(torch.optim.SGD([w], lr=0.1), ga.GradientAgreement())
    >>> optimizer.zero_grad()
    >>> result = optimizer.step((w - torch.tensor([1.0, 2.0, 3.0])) ** 2)
    >>> w
    tensor([0.4667], requires_grad=True)
    """

    def __init__(self, optimizer: Any, aggregator: Aggregator, /) -> None:
        if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
            raise TypeError(
                f"expected an optimizer with param_groups and step(), found "
                f"{type(optimizer).__name__}; wrap one as torch.optim.SGD(model.parameters(), …)"
            )
        self.optimizer = optimizer
        self.aggregator = aggregator

    def step(self, losses: Float[Tensor, " n"] | Sequence[Tensor], /) -> Aggregation:
        """Aggregates the gradients of the task losses and steps the wrapped optimizer.

        Args:
            losses: ``[n]`` tensor or sequence of n scalars, one loss a task.

        Returns:
            The aggregation, its update by parameter position.

        Raises:
            ValueError: ``losses`` is not a vector or is empty, or the aggregator refuses the
                gradients. No parameter, ``.grad`` or optimizer state is touched then.
        """
        if isinstance(losses, Tensor):
            if losses.ndim != 1:
                raise ValueError(
                    f"expected a vector of task losses [n], found shape {list(losses.shape)}; "
                    "give one loss a task, not their mean"
                )
            losses = list(losses.unbind())
        batch = TaskBatch(self._parameters(), self.aggregator)
        for loss in losses:
            batch.add(loss)
        result = batch.backward()
        self.optimizer.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears ``.grad`` of the wrapped optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of the wrapped optimizer."""
        return self.optimizer.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Loads the state of the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the wrapped optimizer."""
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
