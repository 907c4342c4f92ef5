"""Engines: gradients of n tasks and their aggregation, without a loop of the user's own."""

from gradagree_opt.engines.choice import AggregatedGradients, aggregate_gradients
from gradagree_opt.engines.stacked import LossFn, TaskGradients, scalar_loss, task_gradients

__all__ = [
    "AggregatedGradients",
    "LossFn",
    "TaskGradients",
    "aggregate_gradients",
    "scalar_loss",
    "task_gradients",
]
