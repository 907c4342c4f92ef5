"""Small results of many tasks, side by side."""

from torch import Tensor


class Rows:
    """Rows of n tasks that come a few at a time, in one stack ``[n, *shape]`` from the first on.

    Kept apart, each would be allocated in the memory that its task's gradient has just left, which
    the next gradient could then not reuse: n · d in the end.

    >>> import torch
    >>> rows = Rows(3)
    >>> rows.append(torch.tensor([1.0, 2.0]))
    >>> rows.append(torch.tensor([3.0]))
    >>> rows.stack
    tensor([1., 2., 3.])
    """

    stack: Tensor

    def __init__(self, n: int, /) -> None:
        self._n = n
        self._at = 0

    def append(self, rows: Tensor, /) -> None:
        """The next rows ``[k, *shape]``."""
        if self._at == 0:
            self.stack = rows.new_empty((self._n, *rows.shape[1:]))
        self.stack[self._at : self._at + len(rows)] = rows
        self._at += len(rows)
