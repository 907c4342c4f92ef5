"""The look at a finished aggregation, on the host, before anything is changed by it."""

import torch

from gradagree_opt.core.diagnostics import Diagnostics


def troubled(diagnostics: Diagnostics, /, *, finite: bool, agreement: bool) -> bool:
    """Whether :func:`verify` raises: one host synchronisation, or none if nothing is asked for."""
    checks = []
    if finite:
        checks += [diagnostics.nonfinite.any(), (~torch.isfinite(diagnostics.update_norm)).any()]
    if agreement:
        checks.append(diagnostics.degenerate.any())
    return bool(checks) and bool(torch.stack(checks).any())


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
