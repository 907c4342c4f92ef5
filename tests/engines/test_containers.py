"""Containers with code of their own behind a loss function: read past it, and left as found."""

from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import MutableMapping
from weakref import WeakKeyDictionary, proxy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import gradagree_opt as ga

from .models import Model


class Registry(dict):
    """By the name of a class, as transformers keeps what its models can record."""

    def __setitem__(self, key, value):
        super().__setitem__(str(type(key)), value)

    def get(self, key):
        return super().get(str(type(key)))


class Lazy(OrderedDict):
    """Loads what is asked for, as transformers does its configurations."""

    def __getitem__(self, key):
        raise AssertionError(f"{key} was loaded")

    def __iter__(self):
        raise AssertionError("all of it was loaded")

    values = items = keys = __iter__


class LazyList(list):
    def __iter__(self):
        raise AssertionError("all of it was loaded")

    __getitem__ = __len__ = __iter__


class Own(MutableMapping):
    """A mapping that is no dict."""

    def __init__(self, **entries):
        self.store = entries

    def __getitem__(self, key):
        return self.store[key]

    def __setitem__(self, key, value):
        self.store[key] = value

    def __delitem__(self, key):
        del self.store[key]

    def __iter__(self):
        return iter(self.store)

    def __len__(self):
        return len(self.store)


MAPPINGS = {
    "registry": (Registry(a=1), dict.__setitem__),
    "lazy": (Lazy(a=1), OrderedDict.__setitem__),
    "ordered": (OrderedDict(a=1, b=2), OrderedDict.__setitem__),
    "default": (defaultdict(list, a=1), dict.__setitem__),
    "counter": (Counter(a=1), dict.__setitem__),
    "own": (Own(a=1), Own.__setitem__),
    "user": (UserDict(a=1), UserDict.__setitem__),
    "weak": (WeakKeyDictionary({nn.Linear: 1}), None),
}
SEQUENCES = {
    "lazy list": (LazyList([1]), list),
    "deque": (deque([1], maxlen=1), deque),
    "user list": (UserList([1]), UserList),
}


class Keeps(nn.Module):
    def __init__(self, held, write):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.held, self.write = [held], write

    def forward(self, x):
        y = self.linear(x)
        if self.write is not None:
            self.write(self.held[0], y)
        return y


def same_steps(held, write):
    """Gradients and an adaptation, beside those of the linear layer alone."""
    case = Model(Keeps(held, write), mse_loss, (torch.randn(4, 6, 3), torch.randn(4, 6, 2)))
    found = ga.task_gradients(case.loss_fn, case.params, case.tasks).gradients["linear.weight"]
    linear = case.module.linear
    for i, gradient in enumerate(found):
        loss = mse_loss(linear(case.tasks[0][i]), case.tasks[1][i])
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, linear.weight)[0])
    tasks = {"support": case.tasks, "query": case.tasks}
    ga.MAML(case.loss_fn, ga.InnerSGD(0.1, 1)).step(case.params, tasks, ga.Mean())


@pytest.mark.parametrize("kind", MAPPINGS)
def test_a_mapping_with_code_of_its_own_is_read_past_it_and_left_as_found(kind):
    held, write = MAPPINGS[kind]
    raw = dict.items if isinstance(held, dict) else type(held).items
    before = list(raw(held))
    if write is None:
        same_steps(held, None)
    else:
        same_steps(held, lambda held, y: write(held, "b", y) or write(held, "a", [y]))
    assert list(raw(held)) == before


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_sequence_with_code_of_its_own_is_read_past_it_and_left_as_found(kind):
    held, base = SEQUENCES[kind]
    same_steps(held, base.append)
    assert list(base.__iter__(held)) == [1]


def gone(kind):
    thing = kind()
    return proxy(thing)


@pytest.mark.parametrize("kind", [UserDict, UserList, lambda: nn.Linear(1, 1)])
def test_a_weak_proxy_of_what_is_gone_is_read_past(kind):
    same_steps(gone(kind), None)
