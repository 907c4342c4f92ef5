"""Run-time checks of every shape in gradagree_opt's signatures, and settings all tests share."""

import dataclasses
import importlib
import os
import random
import re
import signal
import sys
from collections.abc import Iterator
from functools import partial, wraps
from typing import Any

import hypothesis
import jaxtyping
import pytest
import torch

hypothesis.settings.register_profile("gradagree", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("gradagree")

pytest.register_assert_rewrite("gradagree_testing")
torch.set_num_threads(1)

collect_ignore = ["benchmarks"]  # a command of their own: make bench
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it for a command with &
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Lets through what cvxpy 1.7, the last for Python 3.10, says of TorchJD's NashMTL."""
    if sys.version_info < (3, 11):
        for words in ("You are solving a parameterized problem", "Solution may be inaccurate"):
            config.addinivalue_line("filterwarnings", f"ignore:{words}:UserWarning")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiled") or item.get_closest_marker("compiles"):
        from gradagree_opt.engines.compilation import COMPILES_FROM

        if torch.__version__ < COMPILES_FROM:
            pytest.skip(f"compile=True needs PyTorch {COMPILES_FROM}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first: at the end, one process would wait for the other's."""
    first = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in first)


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Switches the checks on: the one hook that runs before other conftest.py are imported."""
    command_line = pluginmanager.get_plugin("pytestconfig").known_args_namespace
    if command_line.markexpr == "compiled":
        return  # torch.compile cannot trace through the checks
    if command_line.markexpr == "fused":
        if os.environ.get("DEVICE", "cpu") == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads as it is imported
        return  # beartype would look at every value that the interpreter passes
    if "gradagree_opt" in sys.modules:
        raise pytest.UsageError(
            "expected tests/conftest.py to switch on the shape checks of gradagree_opt before it "
            "is imported, found it imported; give no plugin that imports it"
        )
    sys.modules["gradagree_opt.annotations"] = jaxtyping
    _give_beartype_numbers_of_its_own()
    jaxtyping.jaxtyped = partial(_if_it_has_shapes, jaxtyping.jaxtyped)
    jaxtyping.install_import_hook("gradagree_opt", "beartype.beartype")


def _if_it_has_shapes(decorate: Any, of: Any = None, *, typechecker: Any) -> Any:
    """jaxtyping's decorator, for signatures with shapes alone: a sixth of the time otherwise.

    What has none is mypy's to check. Arguments are checked once, where jaxtyping alone would check
    them again with the result.
    """
    if of is None:
        return partial(_if_it_has_shapes, decorate, typechecker=typechecker)
    if dataclasses.is_dataclass(of):
        of.__init__ = _if_it_has_shapes(decorate, of.__init__, typechecker=typechecker)
        return of
    annotations = repr(getattr(of, "__annotations__", {}))
    if isinstance(of, type) or not re.search(r"jaxtyping|\b(Bool|Float|Int)\[", annotations):
        return of
    checked = typechecker(of)

    @wraps(of)
    def switched(*args: Any, **options: Any) -> Any:
        return (of if jaxtyping.config.jaxtyping_disable else checked)(*args, **options)

    decorated = decorate(switched, typechecker=None)
    decorated.__wrapped__ = of
    return decorated


def _give_beartype_numbers_of_its_own() -> None:
    """It samples from Python's generator, and that would look like draws of the model.

    It takes hold of the generator as it first checks a list.
    """
    original, random.getrandbits = random.getrandbits, random.Random(0).getrandbits
    try:
        importlib.import_module("beartype.door").is_bearable([0], list[int])
    finally:
        random.getrandbits = original


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """Lets wrong types through to our own messages: users run without the checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the figures, most of a tiny study's time, where no test looks at them."""
    from gradagree_opt.ablation.report import artefacts

    monkeypatch.setattr(artefacts, "draw", lambda *_: {})


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the figures on the page, but leaves their files empty, which take most of the time."""
    from gradagree_testing.command import leave_pictures_empty

    leave_pictures_empty(monkeypatch)


@pytest.fixture
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures and differentiates the whole graph, and runs it by PyTorch's own kernels."""
    original = torch.compile
    torch._dynamo.reset()  # of one function, older graphs count against a limit

    def captured(function: Any, *, options: Any = (), **settings: Any) -> Any:
        guards = {name: options[name] for name in options if name == "guard_filter_fn"}
        return original(function, backend="aot_eager", options=guards, **settings)

    monkeypatch.setattr(torch, "compile", captured)
