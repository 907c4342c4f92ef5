"""Task distributions: sine regression and Omniglot classification."""

from gradagree_opt.tasks.omniglot import Omniglot
from gradagree_opt.tasks.protocol import Batch, Split, TaskDistribution
from gradagree_opt.tasks.sine import Sine

__all__ = ["Batch", "Omniglot", "Sine", "Split", "TaskDistribution"]
