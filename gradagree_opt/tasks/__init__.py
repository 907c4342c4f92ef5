"""Task distributions: sine regression, grouped regression and Omniglot classification."""

from gradagree_opt.tasks.grouped import GroupedRegression
from gradagree_opt.tasks.omniglot import Omniglot
from gradagree_opt.tasks.protocol import Batch, Split, TaskDistribution
from gradagree_opt.tasks.sine import Sine

__all__ = ["Batch", "GroupedRegression", "Omniglot", "Sine", "Split", "TaskDistribution"]
