"""Task distributions: regression on sines, lines and groups; Omniglot; corruption of any."""

from gradagree_opt.tasks.corrupted import Corrupted
from gradagree_opt.tasks.grouped import GroupedRegression
from gradagree_opt.tasks.lines import Lines
from gradagree_opt.tasks.omniglot import Omniglot
from gradagree_opt.tasks.protocol import Batch, Split, TaskDistribution
from gradagree_opt.tasks.sine import Sine

__all__ = [
    "Batch",
    "Corrupted",
    "GroupedRegression",
    "Lines",
    "Omniglot",
    "Sine",
    "Split",
    "TaskDistribution",
]
