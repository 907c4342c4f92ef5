"""Second-order MAML of networks that normalize, in every engine, against a loop."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import batch_norm, mse_loss

import gradagree_opt as ga
from gradagree_opt.engines.normalization import AffineApart

from .loops import maml
from .problems import assert_same
from .rules import PAPER

N, SHOTS, LR = 4, 5, 0.4
TENSORS = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}


class Fused(nn.Module):
    """A normalization of four features in one of torch's own spellings."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


LAYERS = {
    "torch.layer_norm": Fused(lambda x, w, b: torch.layer_norm(x, (4,), w, b)),
    "torch.native_layer_norm": Fused(
        lambda x, w, b: torch.native_layer_norm(x, (4,), w, b, 1e-5)[0]
    ),
    "torch.batch_norm": Fused(
        lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False)
    ),
    "torch.instance_norm": Fused(
        lambda x, w, b: (
            torch.instance_norm(
                x.unsqueeze(-1).expand(*x.shape, 3) * torch.tensor([1.0, 2.0, -1.0], dtype=x.dtype),
                w,
                b,
                None,
                None,
                True,
                0.1,
                1e-5,
                False,
            )
            .tanh()
            .sum(-1)
        )
    ),
    "BatchNorm1d": nn.BatchNorm1d(4, track_running_stats=False),
    "BatchNorm1d, eval": nn.BatchNorm1d(4).eval(),
    "LayerNorm": nn.LayerNorm(4),
    "RMSNorm": nn.RMSNorm(4),
    "GroupNorm": nn.GroupNorm(2, 4),
    "InstanceNorm1d": nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    ),
    "BatchNorm2d": nn.Sequential(
        nn.Unflatten(1, (2, 2, 1)), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()
    ),
}
ATEN = torch.ops.aten
OPERATIONS = {
    "torch.native_batch_norm": Fused(
        lambda x, w, b: torch.native_batch_norm(x, w, b, None, None, True, 0.1, 1e-5)[0]
    ),
    "aten.native_batch_norm": Fused(
        lambda x, w, b: ATEN.native_batch_norm(x, w, b, None, None, True, 0.1, 1e-5)[0]
    ),
    "aten._native_batch_norm_legit.no_stats": Fused(
        lambda x, w, b: ATEN._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5)[0]
    ),
    "aten.batch_norm.default": Fused(
        lambda x, w, b: ATEN.batch_norm.default(x, w, b, None, None, True, 0.1, 1e-5, False)
    ),
    "aten.layer_norm": Fused(lambda x, w, b: ATEN.layer_norm(x, [4], w, b)),
    "aten.native_layer_norm.default": Fused(
        lambda x, w, b: ATEN.native_layer_norm.default(x, [4], w, b, 1e-5)[0]
    ),
}
ENGINES = [
    ("displacement", "one_backward"),
    ("displacement", "stacked"),
    ("displacement", "streamed"),
    ("gradient", "matrix_free"),
    ("gradient", "stacked"),
    ("gradient", "streamed"),
]


def network(*layers):
    module = nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 2)).double()
    params = {name: torch.randn(p.shape, **TENSORS) + 0.5 for name, p in module.named_parameters()}

    def loss_fn(params, batch):
        return mse_loss(functional_call(module, params, (batch[0],)), batch[1])

    return params, loss_fn


def tasks():
    return {
        part: (torch.randn(N, SHOTS, 3, **TENSORS), torch.randn(N, SHOTS, 2, **TENSORS))
        for part in ("support", "query")
    }


def assert_step_equals_the_loop(params, loss_fn, signal, engine):
    batch = tasks()
    each = [{part: (x[i], y[i]) for part, (x, y) in batch.items()} for i in range(N)]
    found = [maml(loss_fn, params, task, LR, 2) for task in each]
    directions = [task.direction for task in found]
    signals = directions if signal == "gradient" else [task.displacement for task in found]
    meta = ga.MAML(loss_fn, ga.InnerSGD(LR, 2), signal=signal, engine=engine)
    result = meta.step(params, batch, PAPER.aggregator)
    assert_same(result.update, PAPER.combine(signals, directions), tolerance=1e-10)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("signal", "engine"), ENGINES)
def test_step_equals_the_loop_over_tasks(layer, signal, engine):
    assert_step_equals_the_loop(*network(layer), signal, engine)


@pytest.mark.parametrize("layer", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize(("signal", "engine"), ENGINES[:4:3])
def test_step_of_a_layer_spelt_as_an_operation_equals_the_loop(layer, signal, engine):
    assert_step_equals_the_loop(*network(layer), signal, engine)


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4).eval()],
)
def test_step_of_an_exported_program_equals_the_loop(layer):
    network = nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), nn.Linear(4, 2)).double()
    module = torch.export.export(network, (torch.zeros(SHOTS, 3).double(),)).module()
    params = {name: torch.randn(p.shape, **TENSORS) + 0.5 for name, p in module.named_parameters()}

    def loss_fn(params, batch):
        return mse_loss(functional_call(module, params, (batch[0],)), batch[1])

    assert_step_equals_the_loop(params, loss_fn, "displacement", "one_backward")


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("signal", "engine"), [pair for pair in ENGINES if "streamed" not in pair])
def test_steps_from_several_parameters_at_once_are_those_from_each(layer, signal, engine):
    starts, batch = [], tasks()
    for _ in range(3):
        start, loss_fn = network(layer)
        starts.append(start)
    aggregator = ga.GradientAgreement(nonfinite="propagate")
    meta = ga.MAML(loss_fn, ga.InnerSGD(LR, 2), signal=signal, engine=engine)

    def update(params):
        return meta.step(params, batch, aggregator).update

    found = torch.vmap(update)({n: torch.stack([p[n] for p in starts]) for n in starts[0]})
    for index, start in enumerate(starts):
        assert_same({n: u[index] for n, u in found.items()}, update(start), tolerance=1e-10)


@pytest.mark.compiled
@pytest.mark.parametrize("layers", [[*LAYERS][::2], [*LAYERS][1::2]], ids=", ".join)
def test_captured_graph_equals_eager(layers, without_code_generation):
    params, loss_fn = network(*(LAYERS[name] for name in layers))
    batch = tasks()
    eager, compiled = [ga.MAML(loss_fn, ga.InnerSGD(LR, 2), compile=on) for on in (False, True)]
    expected = eager.step(params, batch, PAPER.aggregator).update
    result = compiled.step(params, batch, PAPER.aggregator)
    # PyTorch 2.12 does not compile the one pass through BatchNorm2d and InstanceNorm1d.
    assert result.engine == "one_backward" or torch.__version__ < "2.13"
    assert_same(result.update, expected, tolerance=1e-10)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captured_batch_norm_keeps_its_statistics_in_full_precision(dtype):
    x = (torch.randn(8, 3, 5, **TENSORS) + 10).to(dtype)

    def normalized(x):
        with AffineApart():
            return batch_norm(x, None, None, training=True)

    found = torch.compile(normalized, backend="eager", fullgraph=True)(x)
    expected = batch_norm(x.double(), None, None, training=True)
    bound = 1.01 * expected.abs().max() * torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 8)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= bound


@pytest.mark.compiled
def test_captured_batch_norm_of_single_values_is_refused_as_always():
    def normalized(x):
        with AffineApart():
            return batch_norm(x, None, None, training=True)

    with pytest.raises(RuntimeError, match="more than 1 value per channel"):
        torch.compile(normalized, backend="eager")(torch.ones(1, 3))
