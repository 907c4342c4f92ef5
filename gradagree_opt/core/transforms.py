"""Which transforms a call is inside of: PyTorch (2.5 to 2.14) tells it by private names alone."""

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

is_wrapped = is_functorch_wrapped_tensor
"""Whether a tensor is one of a transform of torch.func, which has no memory of its own."""
is_batched = is_batchedtensor
"""Whether a tensor has an axis that vmap hides."""


def in_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return peek_interpreter_stack() is not None


def in_tracer() -> bool:
    """Whether a tracer, or any other mode that sees every operation, is at work."""
    return torch._C._len_torch_dispatch_stack() > 0


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are taken."""
    return forward_ad._current_level >= 0


def count_vmaps() -> int:
    """How many vmaps are at work, one inside the other."""
    levels = [level.key() for level in retrieve_all_functorch_interpreters()]
    return levels.count(TransformType.Vmap)


def without_vmap(tensor: Tensor, /) -> Tensor:
    """The tensor with the axes that vmap hides."""
    while is_batched(tensor):
        tensor = get_unwrapped(tensor)
    return tensor
