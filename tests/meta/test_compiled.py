"""compile=True against the same step in eager mode."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

import gradagree_opt as ga

from .loops import ALGORITHMS
from .problems import assert_same, loss_fn, problem
from .rules import by_layer, flat

pytestmark = pytest.mark.compiled
CASE = problem(n=3, shots=2, inputs=2, hidden=2, outputs=1)
TRACED_ONCE = CASE._replace(
    params=CASE.params | {"scale2": CASE.params["scale2"].reshape(1)},
    rates=CASE.rates | {"scale2": CASE.rates["scale2"].reshape(1)},
)
"""The same without a 0-d leaf: where there is one in float64, torch traces all of a graph twice."""


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


@pytest.fixture
def logged_by_inductor():
    """What torch's compiler logs, from warnings on."""
    records, logger = [], logging.getLogger("torch._inductor")
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger.addHandler(handler)
    logging.getLogger("torch._inductor.ir").warning("heard")
    assert records.pop().msg == "heard"
    yield records
    logger.removeHandler(handler)


def assert_equals_eager(name, aggregator, case=CASE):
    """Two steps, so that one runs from the cache; fresh aggregators of equal seeds."""
    algorithm = ALGORITHMS[name]
    params = case.meta(algorithm.learns_rates)
    eager = algorithm.build(loss_fn, 0.1, 1)
    compiled = algorithm.build(loss_fn, 0.1, 1, compile=True)
    aggregators = aggregator(), aggregator()
    for _ in range(2):
        expected = eager.step(params, case.tasks, aggregators[0])
        result = compiled.step(params, case.tasks, aggregators[1])
        assert_same(result.update, flat(expected.update), tolerance=1e-12)
        for name in ("losses", "weights", "scores"):
            found, wanted = getattr(result, name), getattr(expected, name)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
        logged = result.diagnostics.log()
        assert logged == pytest.approx(expected.diagnostics.log(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["MAML", "Reptile"])
def test_compiled_equals_eager(name):
    assert_equals_eager(name, ga.GradientAgreement)


@pytest.mark.parametrize(
    ("name", "aggregator"),
    [("MAML", ga.EqualAgreement), ("Reptile", partial(ga.GramianPower, -0.5))],
    ids=["equal", "power"],
)
def test_solvers_are_compiled_without_a_warning(
    name, aggregator, logged_by_inductor, tmp_path, monkeypatch
):
    # What lies in a cache already says nothing.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert_equals_eager(name, aggregator)
    assert not logged_by_inductor


def random_weights():
    return ga.RandomWeights(torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "aggregator"),
    [
        ("FOMAML", ga.GradientAgreement),
        ("Meta-SGD", ga.GradientAgreement),
        ("MAML on gradients", ga.GradientAgreement),
        ("first-order Meta-SGD", ga.GradientAgreement),
        ("MAML", partial(ga.GradientAgreement, scope=by_layer)),
        ("MAML", partial(ga.GradientAgreement, similarity="cosine", match_norm="mean")),
        ("MAML", partial(ga.GradientAgreement, nonfinite="drop", scope="leaf")),
        ("MAML", random_weights),
        ("Reptile", random_weights),
        ("Reptile", partial(ga.Mean, match_norm="agreement")),
        ("MAML on gradients", ga.EqualAgreement),
        ("Reptile", ga.EqualAgreement),
        ("MAML", partial(ga.EqualAgreement, nonfinite="drop", scope="leaf")),
    ],
)
def test_captured_graph_equals_eager(name, aggregator, without_code_generation):
    assert_equals_eager(name, aggregator, TRACED_ONCE)


@pytest.mark.parametrize("name", ["MAML", "Reptile"])
def test_a_divergent_task_still_raises_or_is_dropped(name, without_code_generation):
    meta = ALGORITHMS[name].build(loss_fn, 0.1, 1, compile=True)
    for target in (float("nan"), float("inf")):
        x, y = TRACED_ONCE.tasks["support"]
        y = y.clone()
        y[1] = target
        tasks = TRACED_ONCE.tasks | {"support": (x, y)}
        with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[1\]"):
            meta.step(TRACED_ONCE.params, tasks, ga.GradientAgreement())
        dropped = meta.step(TRACED_ONCE.params, tasks, ga.GradientAgreement(nonfinite="drop"))
        others = ALGORITHMS[name].build(loss_fn, 0.1, 1)
        expected = others.step(TRACED_ONCE.params, TRACED_ONCE.without(1), ga.GradientAgreement())
        assert_same(dropped.update, expected.update, tolerance=1e-12)


@pytest.mark.parametrize("name", ["MAML", "Reptile"])
def test_one_instance_takes_more_aggregators_than_torch_recompiles_a_function(name, monkeypatch):
    """An ablation hands one meta-algorithm many aggregators; torch's own limit is 8."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = ALGORITHMS[name].build(loss_fn, 0.1, 1, compile=True)
    eager = ALGORITHMS[name].build(loss_fn, 0.1, 1)
    with torch._dynamo.config.patch(recompile_limit=2):
        for aggregator in (ga.Mean(), ga.Sum(), ga.NormShare()):
            result = compiled.step(CASE.params, CASE.tasks, aggregator)
            expected = eager.step(CASE.params, CASE.tasks, aggregator)
            assert_same(result.update, expected.update, tolerance=1e-12)


FACTOR = 1.0


class Scaled(nn.Module):
    """What a step may find changed: an attribute, a class attribute, the mode."""

    power = 1.0

    def __init__(self):
        super().__init__()
        self.offset = 0.0

    def forward(self, w, x):
        slope = 2.0 if self.training else 3.0
        return FACTOR * (slope * (w * x) ** self.power + self.offset)


def test_a_compiled_step_sees_what_the_user_has_changed(monkeypatch, without_code_generation):
    model = Scaled()

    def loss(w, x):
        return model(w, x).square().mean()

    w, x = torch.tensor(2.0), torch.tensor([[1.0], [3.0]])
    tasks = {"support": x, "query": x}
    eager, compiled = (ga.MAML(loss, ga.InnerSGD(1e-4, 1), compile=on) for on in (False, True))
    found = set()
    for change in (
        lambda: None,
        model.eval,
        lambda: setattr(model, "offset", 0.5),
        lambda: monkeypatch.setattr(Scaled, "power", 2.0),
        lambda: monkeypatch.setitem(globals(), "FACTOR", 0.5),
        lambda: [setattr(meta.inner, "lr", 2e-4) for meta in (compiled, eager)],
    ):
        change()
        result, expected = (
            meta.step(w, tasks, ga.GradientAgreement()) for meta in (compiled, eager)
        )
        torch.testing.assert_close(result.update, expected.update)
        found.add(round(result.update.item(), 4))
    assert len(found) == 6
