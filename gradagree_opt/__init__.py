"""Gradient Agreement for meta-learning: aggregate over tasks by how well they agree."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from gradagree_opt.public import *  # noqa: F403 - its __all__ names them
else:

    def __getattr__(name: str) -> object:
        """A public name; the first that is asked for imports all of them (PEP 562).

        PyTorch takes seconds to import: a command's ``--help``, the completion of a shell and the
        doctor of a broken installation do not wait for it.
        """
        own = name.startswith("__") and name != "__all__"
        if not own and find_spec(f"{__name__}.{name}") is None:  # a module is Python's to import
            from gradagree_opt import public

            globals().update({each: getattr(public, each) for each in public.__all__})
            globals()["__all__"] = public.__all__
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        __getattr__("__all__")
        return list(globals())
