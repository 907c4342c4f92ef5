"""Inner loops: how the parameters adapt to the support set of one task."""

import math
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from gradagree_opt.core.stacks import PyTree
from gradagree_opt.engines.kept import no_data_set
from gradagree_opt.engines.losses import LossFn
from gradagree_opt.options import check_callable, check_count


@runtime_checkable
class InnerLoop(Protocol):
    """From parameters and the support set of one task to the adapted parameters."""

    def __call__(
        self,
        loss_fn: LossFn,
        params: PyTree,
        support: PyTree,
        /,
        *,
        first_order: bool = False,
        steps: int | None = None,
    ) -> PyTree:
        """θ_i, differentiable in θ; with first_order, as if ∂θ_i/∂θ were the identity."""


def watched(inner: InnerLoop, /) -> AbstractContextManager[Any]:
    """A context that refuses ``tensor.data = …``, which an inner loop of the user's might do."""
    return nullcontext() if isinstance(inner, InnerSGD) else no_data_set()


def check_inner(inner: object, /) -> None:
    """Raises a TypeError unless it can be an inner loop."""
    check_callable("inner", inner, "gradagree_opt.InnerSGD(lr, steps), or a function like it")


class InnerSGD:
    """k steps of gradient descent on the support set: θ ← θ − α_in ∇L(θ).

    Args:
        lr: α_in, one number or 0-d tensor for all parameters, or a pytree like them (Meta-SGD).
        steps: k, the number of steps.
        batch_size: examples of each step: step t takes the t-th consecutive sub-batch of the
            support set and starts over at its end; None takes the whole set each time. The
            paper's "k sub-batches of its examples".

    Raises:
        TypeError: lr is neither a number nor tensors.
        ValueError: steps is no integer or negative; or batch_size does not divide the support set,
            or its tensors have different numbers of examples.

    >>> import gradagree_opt as ga
    >>> loss_fn = lambda w, x: ((w - x) ** 2).mean()
    >>> ga.InnerSGD(lr=0.25, steps=2)(loss_fn, torch.tensor(0.0), torch.tensor([4.0]))
    tensor(3.)
    """

    def __init__(self, lr: float | PyTree, steps: int, *, batch_size: int | None = None) -> None:
        check_count("steps", steps)
        if batch_size is not None:
            check_count("batch_size", batch_size, least=1)
        for rate in tree_leaves(lr):
            # Tuples, here and below: older compilers of PyTorch do not trace a union.
            if not (isinstance(rate, (Tensor, Real)) or getattr(rate, "ndim", None) == 0):
                raise TypeError(
                    f"expected lr to be a number, or tensors like the parameters, found "
                    f"{type(rate).__name__}; give float(lr), or torch.as_tensor(…) for each"
                )
            if isinstance(rate, Real) and not _is_finite(rate):
                raise ValueError(
                    "expected a finite number for lr, found one that is not, or that no float "
                    "holds; give the rate of one inner step, as 0.01"
                )
        self.lr = float(lr) if isinstance(lr, Real) else lr
        self.steps = steps
        self.batch_size = batch_size

    def __repr__(self) -> str:
        return f"InnerSGD(lr={self.lr}, steps={self.steps}, batch_size={self.batch_size})"

    def __call__(
        self,
        loss_fn: LossFn,
        params: PyTree,
        support: PyTree,
        /,
        *,
        first_order: bool = False,
        steps: int | None = None,
    ) -> PyTree:
        """Adapted parameters of one task; ``steps`` in place of the loop's own number."""
        rates = self._rates(params)
        gradient = torch.func.grad(loss_fn)
        for step in range(self.steps if steps is None else check_count("steps", steps)):
            at = tree_map(lambda p: p.detach(), params) if first_order else params
            grads = gradient(at, sub_batch(support, self.batch_size, step))
            params = tree_map(lambda p, g, rate: p - rate * g, params, grads, rates)
        return params

    def _rates(self, params: PyTree) -> PyTree:
        if isinstance(self.lr, (float, int)) or getattr(self.lr, "ndim", None) == 0:
            rate = self.lr if isinstance(self.lr, Tensor) else float(self.lr)  # NumPy's, too
            return tree_map(lambda _: rate, params)
        if tree_structure(self.lr) != tree_structure(params):
            raise ValueError(
                "expected lr to be a float or a pytree like the parameters, found another "
                "structure, or a dict in another order; build it with tree_map over the parameters"
            )
        for rate, param in zip(tree_leaves(self.lr), tree_leaves(params), strict=True):
            shape = torch.Size(getattr(rate, "shape", ()))
            if not _broadcasts(shape, param.shape):
                raise ValueError(
                    f"expected lr to broadcast to the parameters, found {list(shape)} for "
                    f"a parameter of shape {list(param.shape)}; give one number, or one for each "
                    "entry"
                )
        return self.lr


def sub_batch(support: PyTree, batch_size: int | None, step: int, /) -> PyTree:
    """The consecutive part of a support set that an inner step takes; the whole without a size.

    Raises:
        ValueError: ``batch_size`` does not divide the support set, or its tensors have different
            numbers of examples.
    """
    if batch_size is None:
        return support
    sizes: list[Any] = [leaf.shape[0] if leaf.ndim else None for leaf in tree_leaves(support)]
    if len({*sizes}) > 1 or not sizes[0] or sizes[0] % batch_size:
        raise ValueError(
            "expected a support set whose every tensor has as many examples, a multiple of "
            f"batch_size {batch_size}, found {sizes}; expand what the examples share to one entry "
            "for each"
        )
    start = step * batch_size % sizes[0]
    return tree_map(lambda leaf: leaf[start : start + batch_size], support)


def _is_finite(number: Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float holds
        return False


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of the one shape broadcasts to the other."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, of) for size, of in pairs)
