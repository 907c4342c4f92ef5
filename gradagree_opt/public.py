"""The names that users import from ``gradagree_opt`` itself."""

from gradagree_opt.core.aggregation import Aggregator
from gradagree_opt.core.agreement import GradientAgreement, agreement_weights
from gradagree_opt.core.controls import Mean, NormShare, RandomWeights, Sum
from gradagree_opt.core.diagnostics import Diagnostics
from gradagree_opt.core.equal import EqualAgreement, GramianPower
from gradagree_opt.core.results import Aggregation, CollectedTasks
from gradagree_opt.core.robust import GeometricMedian, NormClipped
from gradagree_opt.core.spread import distributed, own_share
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.weightings import Decision, Need, Weighting
from gradagree_opt.engines import (
    AggregatedGradients,
    TaskGradients,
    aggregate_gradients,
    task_gradients,
)
from gradagree_opt.loops.task_batch import TaskBatch
from gradagree_opt.loops.task_optimizer import TaskOptimizer
from gradagree_opt.meta import MAML, InnerSGD, MetaSGD, MetaStep, Reptile

__all__ = [
    "MAML",
    "AggregatedGradients",
    "Aggregation",
    "Aggregator",
    "CollectedTasks",
    "Decision",
    "Diagnostics",
    "EqualAgreement",
    "GeometricMedian",
    "GradientAgreement",
    "GramianPower",
    "InnerSGD",
    "Mean",
    "MetaSGD",
    "MetaStep",
    "Need",
    "NormClipped",
    "NormShare",
    "RandomWeights",
    "Reptile",
    "Statistics",
    "Sum",
    "TaskBatch",
    "TaskGradients",
    "TaskOptimizer",
    "Weighting",
    "aggregate_gradients",
    "agreement_weights",
    "distributed",
    "own_share",
    "task_gradients",
]
