"""Multi-task learning: the learner of a trunk that all tasks share, and a head for each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradagree_opt as ga
from gradagree_opt.ablation.training.networks import BatchFunction, Params
from gradagree_opt.core.results import Aggregation


@dataclass(frozen=True)
class MultiTask:
    """A trunk that all tasks share and a head for each: no inner loop, one gradient of each task.

    The aggregator combines the gradients that the n tasks have in the trunk. A head gets the
    gradient of its own task divided by n, as under the mean loss, whatever the aggregator is.

    Args:
        loss: ``loss(params, batch)`` of the network of one task, its trunk and its head.

    Source: Sener and Koltun 2018 (arXiv:1810.04650), equation 1.

    >>> import torch
    >>> loss = lambda params, x: params["head"] * (params["trunk"] * x).sum()
    >>> params = {"trunk": {"trunk": torch.ones(1)}, "heads": {"head": torch.tensor([1.0, -3.0])}}
    >>> tasks = {"support": torch.tensor([[2.0], [4.0]])}
    >>> MultiTask(loss).aggregate_unchecked(params, tasks, ga.Mean()).update
    {'trunk': {'trunk': tensor([-5.])}, 'heads': {'head': tensor([1., 2.])}}
    """

    loss: BatchFunction

    def aggregate_unchecked(
        self, params: Params, tasks: Any, aggregator: ga.Aggregator, /
    ) -> Aggregation:
        """What an outer step subtracts, a tree like ``params``; all else is of the trunk.

        Args:
            params: ``{"trunk": its leaves, "heads": leaves [n, *shape]}``.
            tasks: ``{"support": batch}`` with leaves ``[n, *shape]``.
            aggregator: what combines the gradients of the trunk.
        """
        trunk, heads = self.gradients(params, tasks["support"])
        aggregation = aggregator.aggregate_unchecked(trunk)
        shares = {name: leaf / len(leaf) for name, leaf in heads.items()}
        return aggregation._replace(update={"trunk": aggregation.update, "heads": shares})

    def gradients(self, params: Params, batches: Any, /) -> tuple[Params, Params]:
        """Of every task's loss, in the trunk and in its own head: leaves ``[n, *shape]``."""

        def loss(trunk: Params, head: Params, batch: Any) -> Tensor:
            return self.loss({**trunk, **head}, batch)

        gradient = torch.func.grad(loss, argnums=(0, 1))
        found: tuple[Params, Params] = torch.func.vmap(gradient, in_dims=(None, 0, 0))(
            params["trunk"], params["heads"], batches
        )
        return found

    def adapt(
        self,
        params: Params,
        support: Any,  # noqa: ARG002 - the signature of learners that adapt
        /,
        *,
        steps: int | None = None,  # noqa: ARG002
    ) -> Params:
        """The parameters as they are: the tasks of the test are those of the training."""
        return params
