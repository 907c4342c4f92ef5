"""Gradient Agreement for meta-learning: aggregate over tasks by how well they agree."""

from gradagree_opt.aggregation import Aggregation, Aggregator
from gradagree_opt.aggregators import (
    GradientAgreement,
    Mean,
    NormShare,
    RandomWeights,
    Sum,
    agreement_weights,
)
from gradagree_opt.collect import TaskBatch
from gradagree_opt.diagnostics import Diagnostics
from gradagree_opt.engines import (
    AggregatedGradients,
    TaskGradients,
    aggregate_gradients,
    task_gradients,
)
from gradagree_opt.equal import EqualAgreement, GramianPower
from gradagree_opt.meta import MAML, InnerSGD, MetaSGD, MetaStep, Reptile
from gradagree_opt.optim import TaskOptimizer
from gradagree_opt.robust import GeometricMedian, NormClipped

__version__ = "0.1.0"

__all__ = [
    "MAML",
    "AggregatedGradients",
    "Aggregation",
    "Aggregator",
    "Diagnostics",
    "EqualAgreement",
    "GeometricMedian",
    "GradientAgreement",
    "GramianPower",
    "InnerSGD",
    "Mean",
    "MetaSGD",
    "MetaStep",
    "NormClipped",
    "NormShare",
    "RandomWeights",
    "Reptile",
    "Sum",
    "TaskBatch",
    "TaskGradients",
    "TaskOptimizer",
    "aggregate_gradients",
    "agreement_weights",
    "task_gradients",
]
