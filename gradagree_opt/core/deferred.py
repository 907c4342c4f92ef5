"""Diagnostics that are computed when somebody looks at them, and not at every step."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import _private_register_pytree_node

from gradagree_opt.annotations import Bool, Float
from gradagree_opt.core.devices import runs_at_once
from gradagree_opt.core.diagnostics import Diagnostics, diagnose
from gradagree_opt.core.statistics import Statistics
from gradagree_opt.core.weightings import Decision


def describe(
    statistics: Statistics,
    decision: Decision,
    nonfinite: Bool[Tensor, " n"],
    update_norm: Float[Tensor, ""],
    /,
    *,
    signal_is_direction: bool,
) -> Diagnostics:
    """:func:`diagnose`, computed when first looked at where that gives the same."""
    compute = partial(
        diagnose,
        statistics,
        decision,
        nonfinite,
        update_norm,
        signal_is_direction=signal_is_direction,
    )
    if not runs_at_once(update_norm):
        return compute()
    return Deferred.of(
        compute, update_norm=update_norm, degenerate=decision.degenerate, nonfinite=nonfinite
    )


class Deferred(Diagnostics):
    """Diagnostics of which some are computed when first looked at.

    Until then the statistics that they come from are kept: n numbers of each kind.
    """

    def __new__(cls, *values: Tensor) -> Diagnostics:  # type: ignore[misc] # of the class above
        """Makes plain diagnostics: pytrees call the class to rebuild an instance."""
        return Diagnostics(*values)

    @classmethod
    def of(cls, compute: Callable[[], Diagnostics], /, **known: Tensor) -> "Deferred":
        """The result of ``compute``, some of whose entries are known beforehand."""
        deferred: Deferred = tuple.__new__(cls)
        vars(deferred).update(compute=cache(compute), known=known)
        return deferred

    def now(self) -> Diagnostics:
        """All of them, computed."""
        values: Diagnostics = vars(self)["compute"]()
        return values

    def _replace(self, **values: Any) -> Diagnostics:  # type: ignore[override] # plain, likewise
        return self.now()._replace(**values)

    def __radd__(self, other: tuple[Any, ...]) -> tuple[Any, ...]:
        return other + self.now()  # a tuple itself would add the one below, which is empty

    def __reduce__(self) -> Any:
        return Diagnostics, tuple(self.now())


def _read(name: str) -> property:
    def read(deferred: Deferred) -> Tensor:
        known: Tensor | None = vars(deferred)["known"].get(name)
        return getattr(deferred.now(), name) if known is None else known

    return property(read, doc=getattr(Diagnostics, name).__doc__)


def _of_values(name: str) -> Callable[..., Any]:
    def method(deferred: Deferred, *others: Any) -> Any:
        plain = [other.now() if isinstance(other, Deferred) else other for other in others]
        return getattr(deferred.now(), name)(*plain)

    return method


for _name in Diagnostics._fields:
    setattr(Deferred, _name, _read(_name))
for _name in ("iter", "getitem", "len", "eq", "ne", "hash", "repr", "contains", "add", "mul"):
    setattr(Deferred, f"__{_name}__", _of_values(f"__{_name}__"))
for _name in ("count", "index", "__rmul__"):
    setattr(Deferred, _name, _of_values(_name))
# The public function would register it with optree too, which warns about named tuples.
_private_register_pytree_node(
    Deferred, lambda deferred: (list(deferred), None), lambda values, _: Diagnostics(*values)
)
