"""Shape annotations: jaxtyping's while types are checked, plain tensors at run time.

The tests put the real jaxtyping module in this module's place, so that shapes are checked there.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:

    class Float:
        """Stands in for every jaxtyping annotation: ``Float[Tensor, "n d"]`` is ``Tensor``."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Int = Float

__all__ = ["Bool", "Float", "Int"]
