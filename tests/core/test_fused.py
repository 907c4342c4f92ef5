"""The kernels of a GPU, run by Triton's interpreter where there is none, against float64."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import gradagree_opt as ga
from gradagree_opt.core import devices
from gradagree_testing import samplers
from gradagree_testing.configurations import CONFIGURATIONS, METHODS, Configuration
from gradagree_testing.samplers import SAMPLERS, Sampler

from .test_contract import NUMBERS, assert_contract, case

pytestmark = [
    pytest.mark.fused,
    # The interpreter's arithmetic is NumPy's, which tells of NaN and inf.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

DEVICE = os.environ.get("DEVICE", "cpu")
WEIGHTED = [c for c in CONFIGURATIONS if c.weights is not None]
SOME = [c for c in WEIGHTED if c.name in ("paper", "inner-False-keep-l1", "equal")]
FEW = (
    samplers.normal,
    samplers.opposite,
    samplers.some_zero,
    samplers.unequal_norms,
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched; here they run on the device of the tests."""
    fused = pytest.importorskip("gradagree_opt.core.fused")
    pytest.importorskip("triton", "3.3", reason="the library does not use Triton before 3.3")
    monkeypatch.setattr(devices, "FUSED_DEVICES", {DEVICE})
    names: list[str] = []
    for name in ("row_sums", "inner_products", "combine"):
        monkeypatch.setattr(fused, name, _noted(getattr(fused, name), names))
    return names


def _noted(function: Any, names: list[str]) -> Any:
    def noted(*arguments: Any) -> Any:
        names.append(function.__name__)
        return function(*arguments)

    return noted


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks of columns, of many programs."""
    from gradagree_opt.core import fused

    fused.plan.cache_clear()
    monkeypatch.setattr(fused, "TILE", 256)
    monkeypatch.setattr(fused, "GRAMIAN_TILE", 512)
    yield
    fused.plan.cache_clear()


def stack(n: int = 5, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    """Leaves of many shapes, strides and places in memory."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.1
        return (values * scale).to(dtype).to(DEVICE)

    return {
        "matrix": rows(n, 9, 13),
        "scalar": rows(n),
        "empty": rows(n, 0, 3),
        "every second task": rows(2 * n, 7)[::2],
        "transposed": rows(n, 5, 6).mT,
        "task axis last": rows(23, n).T,
        "one for all": rows(1, 4).expand(n, 4),
        "every third column": rows(n, 40)[:, ::3],
        "odd place": rows(n * 11 + 1)[1:].view(n, 11),
        "channels last": rows(n, 2, 3, 4, 4).flatten(0, 1).to(memory_format=torch.channels_last)
        .view(n, 2, 3, 4, 4),
    }  # fmt: skip


def in_float64(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().cpu().double(), tree)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize(
    "sampler", FEW if DEVICE == "cpu" else SAMPLERS, ids=lambda sampler: sampler.__name__
)
def test_every_aggregator_keeps_the_contract(configuration: Configuration, sampler: Sampler):
    assert_contract(configuration, case(sampler, torch.float32, 1.0), DEVICE)


@pytest.mark.parametrize("configuration", SOME, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.__name__)
@pytest.mark.parametrize(
    ("dtype", "scale"), [NUMBERS[i] for i in (1, 6)] if DEVICE == "cpu" else NUMBERS
)
def test_every_number_keeps_the_contract(
    configuration: Configuration, sampler: Sampler, dtype: torch.dtype, scale: float
):
    assert_contract(configuration, case(sampler, dtype, scale), DEVICE)


@pytest.mark.parametrize("configuration", METHODS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "scope"),
    [
        (torch.float32, "global"),
        (torch.float32, "leaf"),
        (torch.float64, lambda path: path[0]),
        (torch.bfloat16, "global"),
        (torch.float16, lambda path: path[0]),
    ],
)
def test_leaves_of_every_layout_are_read_where_they_lie(
    configuration: Configuration, dtype: torch.dtype, scope: Any, small_tiles: None
):
    aggregator = configuration.make(scope=scope)
    signals = stack(dtype=dtype)
    result = aggregator.aggregate(signals)
    expected = aggregator.aggregate(in_float64(signals))
    assert_close(result.weights.cpu().double(), expected.weights, rtol=1e-4, atol=1e-5)
    for name, update in result.update.items():
        assert update.dtype == dtype and update.shape == signals[name].shape[1:]
        rounding = 2 * torch.finfo(dtype).eps + 1e-5
        assert_close(update.cpu().double(), expected.update[name], rtol=rounding, atol=rounding)
    for found, value in zip(result.diagnostics, expected.diagnostics, strict=True):
        if value.is_floating_point():
            assert_close(found.cpu().double(), value, rtol=1e-2, atol=1e-3, equal_nan=True)
        else:
            assert torch.equal(found.cpu(), value)


@pytest.mark.parametrize("configuration", METHODS, ids=str)
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e38])
def test_every_scale_of_float32(configuration: Configuration, scale: float, small_tiles: None):
    signals = stack(scale=scale)
    if scale == 1e38:  # without an overflow of the entries themselves
        signals = tree_map(lambda leaf: leaf.clamp(-3e38, 3e38), signals)
    result = configuration.make(nonfinite="propagate").aggregate(signals)
    expected = configuration.make().aggregate(in_float64(signals))
    assert_close(result.weights.cpu().double(), expected.weights, rtol=1e-4, atol=1e-5)


def test_leaves_of_mixed_dtypes_are_summed_in_the_widest():
    signals = {
        "float": torch.randn(5, 7, device=DEVICE),
        "bfloat16": torch.randn(5, 3, device=DEVICE).bfloat16(),
        "float64": torch.randn(5, 4, device=DEVICE, dtype=torch.float64),
        "float16": torch.randn(5, device=DEVICE).half(),
    }
    for chosen in (signals, {k: v for k, v in signals.items() if k != "float64"}):
        result = ga.GradientAgreement().aggregate(chosen)
        expected = ga.GradientAgreement().aggregate(in_float64(chosen))
        widest = torch.float64 if "float64" in chosen else torch.float32
        assert result.weights.dtype == result.diagnostics.update_norm.dtype == widest
        tolerance = 1e-12 if widest == torch.float64 else 1e-5
        assert_close(
            result.weights.cpu().double(), expected.weights, rtol=tolerance, atol=tolerance
        )
        for name, leaf in result.update.items():
            assert leaf.dtype == chosen[name].dtype
            rounding = 2 * torch.finfo(leaf.dtype).eps
            assert_close(leaf.cpu().double(), expected.update[name], rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 5000), (2, 3), (64, 40), (65, 3), (1024, 5)])
@pytest.mark.parametrize("configuration", METHODS, ids=str)
def test_any_number_of_tasks(configuration: Configuration, n: int, d: int, launches: list[str]):
    signals = torch.randn(n, d, generator=torch.Generator().manual_seed(1)).to(DEVICE) + 0.2
    result = configuration.make().aggregate(signals)
    expected = configuration.make().aggregate(in_float64(signals))
    assert_close(result.weights.cpu().double(), expected.weights, rtol=1e-3, atol=1e-5)
    assert_close(result.update.cpu().double(), expected.update, rtol=1e-3, atol=1e-4)
    assert "combine" in launches


def test_more_tasks_take_the_path_of_other_devices(launches: list[str]):
    ga.GradientAgreement()(torch.ones(1025, 2, device=DEVICE))
    assert launches == []


@pytest.mark.parametrize("configuration", METHODS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["matrix", "scalar"])
def test_bad_tasks_are_named_dropped_or_passed_on(
    configuration: Configuration, bad: float, name: str
):
    signals = stack()
    signals[name].view(5, -1)[3, -1] = bad
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[3\]"):
        configuration.make()(signals)
    rest = {key: leaf[[0, 1, 2, 4]] for key, leaf in signals.items()}
    dropped = configuration.make(nonfinite="drop").aggregate(signals)
    expected = configuration.make().aggregate(rest)
    assert_close(dropped.update, expected.update, rtol=1e-5, atol=1e-5)
    assert dropped.weights[3] == 0
    assert dropped.diagnostics.nonfinite.tolist() == [False, False, False, True, False]
    passed = configuration.make(nonfinite="propagate").aggregate(signals)
    assert passed.update[name].isnan().all()
    assert passed.diagnostics.nonfinite[3]


def test_a_signal_weights_other_directions():
    signal, directions = stack(), {"w": torch.randn(5, 6, device=DEVICE)}
    result = ga.GradientAgreement().aggregate(directions, signal)
    expected = ga.GradientAgreement().aggregate(in_float64(directions), in_float64(signal))
    assert_close(result.weights.cpu().double(), expected.weights, rtol=1e-4, atol=1e-6)
    assert_close(result.update["w"].cpu().double(), expected.update["w"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("configuration", METHODS, ids=str)
def test_two_runs_give_the_same_bits(configuration: Configuration, small_tiles: None):
    signals = stack()
    first, second = (configuration.make().aggregate(signals) for _ in range(2))
    assert_close(tuple(second), tuple(first), rtol=0, atol=0, equal_nan=True)


def test_memory_that_is_used_again_is_read_anew():
    signals = torch.randn(5, 40, device=DEVICE)
    aggregator = ga.GradientAgreement()
    for _ in range(3):
        expected = aggregator.aggregate(signals.double())
        assert_close(aggregator.aggregate(signals).weights.double(), expected.weights)
        signals.copy_(torch.randn(5, 40))


def test_transforms_and_autograd_take_the_path_of_other_devices(launches: list[str]):
    aggregator = ga.GradientAgreement(nonfinite="propagate")
    stacks = torch.randn(3, 5, 4, device=DEVICE)
    found = torch.func.vmap(aggregator)(stacks)
    torch.func.jvp(aggregator, (stacks[0],), (stacks[1],))
    torch.func.grad(lambda stack: aggregator(stack).sum())(stacks[0])
    assert launches == []
    leaf = stacks[0].clone().requires_grad_()
    aggregator(leaf).sum().backward()
    assert leaf.grad is not None and launches == ["row_sums"]  # a constant of differentiation
    with torch.no_grad():
        assert_close(found[0], aggregator(leaf))
    assert launches[-1] == "combine"


def test_without_triton_the_path_of_other_devices_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "_fused", lambda kind: None)
    signals = stack()
    expected = ga.GradientAgreement().aggregate(in_float64(signals))
    weights = ga.GradientAgreement().aggregate(signals).weights
    assert_close(weights.cpu().double(), expected.weights, rtol=1e-5, atol=1e-6)


def test_a_triton_that_launches_a_kernel_only_once_is_not_used(monkeypatch: pytest.MonkeyPatch):
    class Once(dict[Any, Any]):  # as Triton before 3.3, whose compiled kernels take no constants
        def get(self, key: Any) -> Any:
            if key in self:
                raise TypeError("function takes exactly 17 arguments (20 given)")

    from gradagree_opt.core import fused

    try_kernels = devices._fused.__wrapped__
    assert try_kernels(DEVICE) is not None
    monkeypatch.setattr(fused, "_compiled", Once())
    assert try_kernels(DEVICE) is None
