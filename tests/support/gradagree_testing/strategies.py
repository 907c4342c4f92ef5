"""Hypothesis strategies of small integer matrices: every sum and product of theirs is exact."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from gradagree_testing.reference import Array

INTEGERS = st.integers(-9, 9)


@st.composite
def matrices(
    draw: st.DrawFn, *, min_tasks: int = 1, max_tasks: int = 6, max_parameters: int = 5
) -> Array:
    """Integer signals [n, d], as Python integers in an array of objects."""
    n = draw(st.integers(min_tasks, max_tasks))
    d = draw(st.integers(1, max_parameters))
    rows = draw(st.lists(st.lists(INTEGERS, min_size=d, max_size=d), min_size=n, max_size=n))
    return np.array(rows, dtype=object).reshape(n, d)


def tensor(matrix: Array, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(matrix.astype(float), dtype=dtype)
