"""Task distributions: regression, digits, Omniglot, mini-ImageNet, and the corruption of any."""

from gradagree_opt.tasks.corrupted import Corrupted
from gradagree_opt.tasks.digits import DigitPairs
from gradagree_opt.tasks.grouped import GroupedRegression
from gradagree_opt.tasks.lines import Lines
from gradagree_opt.tasks.mini_imagenet import MiniImageNet
from gradagree_opt.tasks.omniglot import Omniglot
from gradagree_opt.tasks.protocol import Batch, Split, TaskDistribution
from gradagree_opt.tasks.sine import Sine

__all__ = [
    "Batch",
    "Corrupted",
    "DigitPairs",
    "GroupedRegression",
    "Lines",
    "MiniImageNet",
    "Omniglot",
    "Sine",
    "Split",
    "TaskDistribution",
]
