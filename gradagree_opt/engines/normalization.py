"""Normalization layers where a derivative is taken of a vmap that has taken one already.

There, torch (2.14) differentiates its fused batch, layer and instance normalization wrongly,
without a word, if their weight or its gradient differs from task to task: pytorch/functorch#534.
With the weight and the bias apart, it is right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradagree_opt.core.transforms import count_vmaps
from gradagree_opt.engines.kept import NoDataSet


class AffineApart(NoDataSet):
    """Inside the block, normalization is followed by the weight and the bias as two operations.

    As every operation passes through it anyway, it refuses what :class:`NoDataSet` does.

    >>> import torch
    >>> x, weight = torch.tensor([[1.0, 3.0]]), torch.tensor([2.0, 5.0])
    >>> with AffineApart():
    ...     functional.layer_norm(x, (2,), weight, eps=0.0)
    tensor([[-2.,  5.]])
    """


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001 - torch.layer_norm has it, and ignores it too
) -> Tensor:
    return _affine(functional.layer_norm(input, list(normalized_shape), eps=eps), weight, bias)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    of_batch = training and running_mean is None and x.numel() > x.shape[1]
    if of_batch and _written_out():
        normal = _normal(x, [0, *range(2, x.ndim)], eps)
    elif not training and running_mean is not None and torch.compiler.is_compiling():
        mean, variance = (_by_channel(each, x) for each in (running_mean, running_var))
        normal = _normal(x, [], eps, mean, variance)
    else:
        normal = functional.batch_norm(
            x, running_mean, running_var, None, None, training, momentum, eps
        )
    return _affine(normal, _by_channel(weight, x), _by_channel(bias, x))


def _written_out() -> bool:
    """Whether torch's own is slow (compiled) or has no second derivative (in two vmaps)."""
    return torch.compiler.is_compiling() or count_vmaps() > 1


def _normal(
    x: Tensor,
    dims: list[int],
    eps: float,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> Tensor:
    """By the statistics given, or those over the dims, in operations that torch.compile fuses.

    Compiled, torch's own takes twice the time, and that of evaluation mode runs one task after the
    other; uncompiled, it takes a sixth less.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - (wide.mean(dims, keepdim=True) if mean is None else mean)
    if variance is None:
        variance = centred.square().mean(dims, keepdim=True)
    return (centred * torch.rsqrt(variance + eps)).to(x.dtype)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    of_instance = use_input_stats and running_mean is None and x.numel() > x.shape[0] * x.shape[1]
    if of_instance and _written_out():
        normal = _normal(x, [*range(2, x.ndim)], eps)
    else:
        normal = functional.instance_norm(
            x, running_mean, running_var, None, None, use_input_stats, momentum, eps
        )
    return _affine(normal, _by_channel(weight, x), _by_channel(bias, x))


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normal = normal * weight
    return normal if bias is None else normal + bias


def _by_channel(values: Tensor | None, x: Tensor) -> Tensor | None:
    """One value for each channel of ``[n, channels, *sizes]``."""
    return None if values is None else values.reshape(-1, *[1] * (x.ndim - 2))


def _native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    normal, mean, rstd = torch.native_layer_norm(input, list(normalized_shape), None, None, eps)
    return _affine(normal, weight, bias), mean, rstd


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,  # noqa: ARG001 - torch.batch_norm's, for a GPU
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,  # noqa: ARG001 - torch.instance_norm's, for a GPU
) -> Tensor:
    return _instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _apart(operation: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """An operation of input, weight, bias and others that gives the normalized input first."""

    def normalized(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Any
    ) -> tuple[Tensor, ...]:
        normal, *rest = operation(input, None, None, *others)
        return _affine(normal, _by_channel(weight, input), _by_channel(bias, input)), *rest

    return normalized


def _spellings() -> dict[Any, Callable[..., Any]]:
    """The replacement of each operation, by torch's name of it and those of exported programs."""
    apart: dict[str, Callable[..., Any]] = {
        "layer_norm": _layer_norm,
        "native_layer_norm": _native_layer_norm,
        "batch_norm": _torch_batch_norm,
        "instance_norm": _torch_instance_norm,
    }
    for name in ("native_batch_norm", "_native_batch_norm_legit"):
        apart[name] = _apart(getattr(torch, name))
    instead: dict[Any, Callable[..., Any]] = {}
    for name, function in apart.items():
        packet = getattr(torch.ops.aten, name)
        overloads = [getattr(packet, n) for n in packet.overloads() if not n.endswith("out")]
        instead |= dict.fromkeys([getattr(torch, name), packet, *overloads], function)
    return instead


AffineApart.instead = {
    **NoDataSet.instead,
    functional.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
    **_spellings(),
}
