"""Meta-learning as pure functions: inner loops, and MAML, FOMAML, Meta-SGD and Reptile on them."""

from gradagree_opt.meta.inner import InnerLoop, InnerSGD
from gradagree_opt.meta.maml import MAML, MetaSGD
from gradagree_opt.meta.reptile import Reptile
from gradagree_opt.meta.steps import MetaStep

__all__ = ["MAML", "InnerLoop", "InnerSGD", "MetaSGD", "MetaStep", "Reptile"]
