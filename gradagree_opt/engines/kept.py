"""Puts back what a pass over all tasks at once has changed in a model.

A tensor that forward assigns under a transform of torch.func is of no use after it: a module that
keeps one can neither run nor be saved.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from gradagree_opt.batchnorm import ChangedBufferError
from gradagree_opt.core.transforms import is_wrapped
from gradagree_opt.engines.reached import Names, base_of, entries, reach


@contextmanager
def left_as_found(source: object, /) -> Iterator[None]:
    """A context around a run under torch.func: what the source reaches is afterwards as before.

    Where attributes, lists and dicts hold a tensor of the transforms, they get back what they held.

    Args:
        source: the loss function, or several things that it is made of.

    Raises:
        ChangedBufferError: the block has changed a buffer of a module, which is as it was again.
    """
    if torch.compiler.is_compiling():
        yield
        return
    model = Model(source)
    try:
        yield
    except BaseException:
        model.restore()
        model.restore_wrapped()
        raise
    changed = model.restore_buffers()
    model.restore_attributes()
    model.restore_wrapped()
    if changed is not None:
        raise ChangedBufferError(f"the buffer {changed} changed")


class Model:
    """What a loss function reaches, as it is now, to be put back later.

    >>> model = nn.BatchNorm1d(1)
    >>> found = Model(lambda x, model=model: model(x))
    >>> _ = model(torch.ones(2, 1))
    >>> found.restore_buffers()
    "'num_batches_tracked' of BatchNorm1d"
    >>> model.num_batches_tracked
    tensor(0)
    """

    def __init__(self, source: object, /) -> None:
        modules, _, holders = reach(source)
        self.modules = modules
        self._buffers = [_Buffer.of(m, n, b) for m in modules for n, b in m._buffers.items()]
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        self._parameters = [(m._parameters, dict(m._parameters)) for m in modules]
        self._holders = [(holder, _entries(holder)) for holder in holders]

    def restore(self) -> None:
        """Puts back the buffers and the attributes of the modules."""
        self.restore_buffers(always=True)
        self.restore_attributes()

    def restore_attributes(self) -> None:
        """Puts back the attributes of the modules, their parameters among them."""
        for holder, before in self._attributes:
            _restore(holder, before, lambda _: True)
        self.restore_parameters()

    def restore_parameters(self) -> None:
        """Puts back parameters in whose place a functional call has left others.

        It does so where a module holds a submodule under two names (torch 2.14).
        """
        for holder, before in self._parameters:
            _restore(holder, before, lambda _: True)

    def restore_buffers(self, *, always: bool = False) -> str | None:
        """Puts back the buffers, and names the last one that had changed; None if none had.

        Args:
            always: also where PyTorch has noted no change.
        """
        changed = [str(buffer) for buffer in self._buffers if buffer.restore(always=always)]
        return changed[-1] if changed else None

    def restore_wrapped(self) -> None:
        """Puts back what is held in the place of a tensor of a transform."""
        for holder, before in self._holders:
            _restore(holder, before, _holds_wrapped)


class _Buffer(NamedTuple):
    """A buffer of a module, and what it was."""

    module: nn.Module
    name: str
    tensor: Tensor | None
    value: Tensor | None
    stamp: tuple[int, int]

    @classmethod
    def of(cls, module: nn.Module, name: str, tensor: Tensor | None) -> "_Buffer":
        if tensor is None:
            return cls(module, name, None, None, (0, 0))
        return cls(module, name, tensor, tensor.detach().clone(), _stamp(tensor))

    def __str__(self) -> str:
        return f"{self.name!r} of {type(self.module).__name__}"

    def restore(self, *, always: bool) -> bool:
        """Puts it back, and says whether it had changed.

        A change by batch_norm's own kernel it misses: PyTorch does not note that.
        """
        now = self.module._buffers.get(self.name)
        replaced = now is not self.tensor
        if replaced:
            self.module._buffers[self.name] = self.tensor
        if self.tensor is None or self.value is None:
            return replaced
        noted = _stamp(self.tensor) != self.stamp
        dense = self.tensor.layout is torch.strided
        changed = noted and not (dense and torch.equal(self.tensor, self.value))
        if changed or (always and _changes_unnoted(self.tensor)):
            with torch.no_grad():
                self.tensor.copy_(self.value)
        return replaced or changed


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Version and address, where the kind of tensor has them: one of them changes with it."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr() if tensor.layout is torch.strided else 0


def _changes_unnoted(tensor: Tensor) -> bool:
    """Whether a kernel can write to it past its version, as batch_norm's own does.

    None writes so to a sparse tensor, an expanded one, or one of inference mode outside of it.
    """
    if tensor.layout is not torch.strided:
        return False
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return all(step or n < 2 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


class NoDataSet(TorchFunctionMode):
    """Refuses ``tensor.data = …``, after which a tensor of the transforms would end the process.

    It sees every operation of its block: enter it around the model, and not around a whole step.
    """

    instead: Mapping[Callable[..., Any], Callable[..., Any]]
    """What stands for a function in the block."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls the function, or what stands for it."""
        function = self.instead.get(func, func)
        return function(*args, **kwargs) if kwargs else function(*args)


_SET_DATA: Callable[[Tensor, Tensor], None] = Tensor.data.__set__  # type: ignore[attr-defined] # a descriptor


def _set_data(tensor: Tensor, data: Tensor) -> None:
    if _holds_wrapped(data):
        raise ChangedBufferError("a model that sets the data of a tensor")
    _SET_DATA(tensor, data)


NoDataSet.instead = {_SET_DATA: _set_data}


def no_data_set() -> AbstractContextManager[Any]:
    """:class:`NoDataSet`; nothing where it is active already or torch.compile reads the block."""
    if torch.compiler.is_compiling():
        return nullcontext()
    mode: object = _get_current_function_mode()  # type: ignore[no-untyped-call] # torch's
    if isinstance(mode, NoDataSet):
        return nullcontext()
    return NoDataSet()


_UNSET = object()


def _entries(holder: Any) -> Any:
    if isinstance(holder, Names):
        space = holder.namespace
        return {name: space[name] for name in holder.names if name in space}
    if isinstance(holder, CellType):
        try:
            return holder.cell_contents
        except ValueError:
            return _UNSET
    return entries(holder)


def _fill(cell: CellType, before: object) -> None:
    cell.cell_contents = before
    if before is _UNSET:
        del cell.cell_contents


def _restore(holder: Any, before: Any, is_meant: Callable[[Any], bool]) -> None:
    if isinstance(holder, CellType):
        now = _entries(holder)
        if now is not before and is_meant(now):
            _fill(holder, before)
    elif isinstance(holder, list | deque):
        now, base = entries(holder), base_of(holder)
        same = len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
        known = {id(each) for each in before}
        if not same and is_meant([each for each in now if id(each) not in known]):
            base.clear(holder)
            base.extend(holder, before)
    else:
        space = holder.namespace if isinstance(holder, Names) else holder
        now, base = _entries(holder), base_of(space)
        changed = [name for name, value in now.items() if before.get(name, _UNSET) is not value]
        for name in changed:
            if is_meant(now[name]):
                if name in before:
                    base.__setitem__(space, name, before[name])
                else:
                    base.__delitem__(space, name)
        if space is holder:
            for name in [name for name in before if name not in now]:
                base.__setitem__(space, name, before[name])


def _holds_wrapped(value: Any, depth: int = 3) -> bool:
    """Whether it is, or holds, a tensor of a transform of torch.func."""
    if isinstance(value, Tensor):
        return is_wrapped(value)
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        return any(_holds_wrapped(each, depth - 1) for each in value.values())
    if isinstance(value, list | tuple | set | deque):
        return any(_holds_wrapped(each, depth - 1) for each in value)
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict) and not isinstance(value, type | nn.Module):
        return _holds_wrapped(state, depth - 1)
    return False
