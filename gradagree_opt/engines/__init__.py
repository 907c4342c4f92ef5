"""Engines: gradients of n tasks and their aggregation, without a loop of the user's own."""

from gradagree_opt.engines.choice import AggregatedGradients
from gradagree_opt.engines.gradients import aggregate_gradients
from gradagree_opt.engines.losses import LossFn, ScalarLoss
from gradagree_opt.engines.stacked import TaskGradients, task_gradients

__all__ = [
    "AggregatedGradients",
    "LossFn",
    "ScalarLoss",
    "TaskGradients",
    "aggregate_gradients",
    "task_gradients",
]
