"""A weighting of one's own: tasks count by the lengths of their gradients, not by the squares."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import gradagree_opt as ga


@dataclass(frozen=True)
class LengthShare:
    """w_i = ‖g_i‖ / Σ_j ‖g_j‖; 1/n where all are zero."""

    needs: ClassVar[frozenset[ga.Need]] = frozenset({"squared_norms"})

    def __call__(self, statistics: ga.Statistics, /) -> Tensor:
        lengths = statistics.squared_norms.sqrt()
        active = statistics.active.to(lengths)
        total = lengths.sum(-1, keepdim=True)
        shares = lengths / torch.where(total > 0, total, 1)
        return torch.where(total > 0, shares, active / active.sum().clamp(min=1))
