"""The look at a finished aggregation, on the host, before anything is changed by it."""

import math

import torch

from gradagree_opt.diagnostics import Diagnostics


def troubled(diagnostics: Diagnostics, /, *, finite: bool, agreement: bool) -> bool:
    """Whether :func:`verify` raises: one host synchronisation, or none if nothing is asked for."""
    flags = []
    if finite:
        flags += [diagnostics.update_norm.reshape(1), diagnostics.nonfinite]
    if agreement:
        flags.append(diagnostics.degenerate.reshape(-1))
    if not flags:
        return False
    numbers = torch.cat(flags).tolist()  # one operation: on a GPU each costs as much as a read
    lost = finite and not math.isfinite(numbers.pop(0))
    return lost or any(numbers)


def verify(diagnostics: Diagnostics, /, *, finite: bool, agreement: bool) -> None:
    """Raises what the policies say, after the one host synchronisation of :func:`troubled`.

    Args:
        diagnostics: of the aggregation.
        finite: raise where a task or the update is not finite.
        agreement: raise where the scores cancel.

    Raises:
        ValueError: in one sentence that names the tasks and what to do.
    """
    if not troubled(diagnostics, finite=finite, agreement=agreement):
        return
    tasks = diagnostics.nonfinite.nonzero().flatten().tolist()
    if finite and tasks:
        raise ValueError(
            f"expected finite values for every task, found NaN or inf in tasks {tasks}; lower the "
            "inner rate, or give nonfinite='drop' to leave such tasks out"
        )
    if agreement and diagnostics.degenerate.any():
        raise ValueError(
            "expected tasks that agree or disagree, found scores that cancel to zero (all signals "
            "zero, Σ g_i = 0, or no score left by negative='clip'); give degenerate='uniform' or "
            "'zero' for a fallback"
        )
    raise ValueError(
        "expected a finite update, found NaN or inf although every loss and signal looked at is "
        "finite; nonfinite='drop' leaves a task of such a gradient out, engine='stacked' names it, "
        "and float64 signals hold weights of norms that lie too far apart, or of a small damping"
    )
