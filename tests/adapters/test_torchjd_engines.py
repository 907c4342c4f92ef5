"""TorchJD's aggregators in meta-steps, engines and the user's own loop."""

import pytest
import torch
from torch.utils._pytree import tree_map

import gradagree_opt as ga

pytest.importorskip("torchjd", reason="torchjd is not installed")

from gradagree_opt.adapters.torchjd import from_torchjd
from torchjd import aggregation as jd

from .torchjd_cases import OF_MATRIX, assert_same, flat, make, matrix, seeded

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # Nash

PARAMS = {"w": matrix(7, 3, 4), "v": matrix(8, 4, 1)}


def loss_fn(params, batch):
    x, y = batch
    return ((torch.tanh(x @ params["w"]) @ params["v"] - y) ** 2).mean()


def tasks(n=4):
    def batch(seed):
        return (matrix(seed, n, 15).unflatten(1, (5, 3)), matrix(seed + 1, n, 5)[..., None])

    return {"support": batch(10), "query": batch(20)}


def task(i):
    return tree_map(lambda leaf: leaf[i], tasks())


def displacements_and_gradients(maml):
    """One task after the other, by autograd alone."""
    signals, directions = [], []
    for i in range(4):
        start = tree_map(lambda p: p.clone().requires_grad_(), PARAMS)
        adapted = maml.adapt(start, task(i)["support"])
        loss = loss_fn(adapted, task(i)["query"])
        directions.append(flat(torch.autograd.grad(loss, list(start.values()))))
        signals.append(flat(start) - flat(adapted))
    return torch.stack(signals), torch.stack(directions)


@pytest.mark.parametrize("name", ["UPGrad", "PCGrad", "NashMTL", "IMTLG", "AlignedMTL", "MGDA"])
@pytest.mark.parametrize("signal", ["displacement", "gradient"])
def test_maml_weights_the_meta_gradients_by_the_gramian_of_the_signal(name, signal):
    maml = ga.MAML(loss_fn, ga.InnerSGD(lr=0.1, steps=2), signal=signal)
    result = seeded(maml.step, PARAMS, tasks(), from_torchjd(make(name)))
    displacements, gradients = displacements_and_gradients(maml)
    measured = displacements if signal == "displacement" else gradients
    theirs = make(name)
    weighting = getattr(theirs, "gramian_weighting", None)
    unit = 1.0 if name == "NashMTL" else measured.norm(dim=1).max()
    scaled = measured / unit
    weights = seeded(weighting, scaled @ scaled.T) if weighting else theirs.weighting(scaled)
    # NashMTL's solver stops at a tolerance of its own.
    assert_same(result.update, weights @ gradients, 1e-9 if name == "NashMTL" else 1e-12)


@pytest.mark.parametrize("name", ["UPGrad", "ConFIG"])
def test_reptile_aggregates_displacements(name):
    reptile = ga.Reptile(loss_fn, ga.InnerSGD(lr=0.1, steps=2))
    result = reptile.step(PARAMS, tasks(), from_torchjd(make(name), nonfinite="raise"))
    displacements, _ = displacements_and_gradients(reptile)
    unit = displacements.norm(dim=1).max()
    assert_same(result.update, unit * make(name)(displacements / unit), 1e-12)


@pytest.mark.parametrize("name", ["UPGrad", "TrimmedMean"])
def test_multi_task_engine_aggregates_gradients(name):
    batch = tasks()["support"]
    result = ga.aggregate_gradients(loss_fn, PARAMS, batch, from_torchjd(make(name)))
    gradients = ga.task_gradients(loss_fn, PARAMS, batch).gradients
    rows = torch.cat([leaf.flatten(1) for leaf in gradients.values()], 1)
    assert_same(result.update, make(name)(rows), 1e-12)


def multi_task(aggregator, engine):
    batch = tasks()["support"]
    return seeded(lambda: ga.aggregate_gradients(loss_fn, PARAMS, batch, aggregator, engine=engine))


def meta(signal):
    def step(aggregator, engine):
        maml = ga.MAML(loss_fn, ga.InnerSGD(lr=0.1, steps=2), signal=signal, engine=engine)
        return seeded(maml.step, PARAMS, tasks(), aggregator)

    return step


STEPS = {
    "multi-task": multi_task,
    "gradient": meta("gradient"),
    "displacement": meta("displacement"),
}
each_step = pytest.mark.parametrize("step", STEPS)
# Those that read what is not there: a Gramian, or the directions one by one.
REFUSALS = {
    ("UPGrad", "multi-task"): {
        "streamed": "its weighting reads gramian, which needs all gradients at once",
        "matrix_free": "its weighting reads gramian, which no row sum tells",
        "one_backward": "its signal is the gradient, which no forward pass tells",
    },
    ("UPGrad", "displacement"): {"matrix_free": "its signal is not the gradient"},
    ("ConFIG", "multi-task"): {
        "streamed": "its weighting reads directions, which needs all gradients at once",
        "matrix_free": "its weighting reads directions, which no row sum tells",
        "one_backward": "its signal is the gradient, which no forward pass tells",
    },
    ("ConFIG", "displacement"): {
        "streamed": "its weighting reads directions, which needs all gradients at once",
        "matrix_free": "its signal is not the gradient",
        "one_backward": "its update is no weighted sum, and needs the gradient of each task",
    },
}
for kind in ("UPGrad", "ConFIG"):
    REFUSALS[kind, "gradient"] = REFUSALS[kind, "multi-task"]


@each_step
@pytest.mark.parametrize("engine", ["stacked", "streamed", "matrix_free", "one_backward"])
@pytest.mark.parametrize("name", ["UPGrad", *OF_MATRIX])
def test_an_engine_gives_the_update_of_the_stack_or_says_why_not(name, engine, step):
    refusal = REFUSALS["UPGrad" if name == "UPGrad" else "ConFIG", step].get(engine)
    if refusal is not None:
        with pytest.raises(ValueError, match=f"{refusal}; take engine='stacked'"):
            STEPS[step](from_torchjd(make(name)), engine)
        return
    expected = STEPS[step](from_torchjd(make(name)), "stacked")
    found = STEPS[step](from_torchjd(make(name)), engine)
    assert found.engine == engine
    assert_same(found.update, expected.update, 1e-12)


@each_step
@pytest.mark.parametrize("stack_bytes", [0, 2**26], ids=["a large stack", "a small one"])
@pytest.mark.parametrize("name", ["UPGrad", *OF_MATRIX])
def test_auto_takes_an_engine_that_can(name, stack_bytes, step, monkeypatch):
    monkeypatch.setattr("gradagree_opt.engines.candidates.STACK_BYTES", stack_bytes)
    found = STEPS[step](from_torchjd(make(name)), "auto")
    forward = name == "UPGrad" and step == "displacement"
    assert found.engine == ("one_backward" if forward else "stacked")


@pytest.mark.parametrize("name", OF_MATRIX)
def test_what_is_no_weighted_sum_sees_the_meta_gradients(name):
    maml = ga.MAML(loss_fn, ga.InnerSGD(lr=0.1, steps=2))
    result = seeded(maml.step, PARAMS, tasks(), from_torchjd(make(name)))
    _, gradients = displacements_and_gradients(maml)
    assert_same(result.update, seeded(make(name), gradients), 1e-12)
    assert result.weights.isnan().all()
    logged = result.diagnostics.log()
    assert "update_norm" in logged and "cancellation" in logged
    assert not {"weight_sum", "smallest_weight", "negative_share", "effective_tasks"} & set(logged)


def collected(aggregator, memory):
    start = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    maml = ga.MAML(loss_fn, ga.InnerSGD(lr=0.1, steps=2))
    batch = ga.TaskBatch(start, aggregator, memory=memory)
    for i in range(4):
        adapted = maml.adapt(start, task(i)["support"])
        batch.add(loss_fn(adapted, task(i)["query"]), adapted=adapted)
    batch.backward()
    return [p.grad for p in start.values()]


@pytest.mark.parametrize("name", ["UPGrad", *OF_MATRIX])
@pytest.mark.parametrize("memory", ["graph", "stream"])
def test_collected_tasks_give_what_maml_gives(name, memory):
    maml = ga.MAML(loss_fn, ga.InnerSGD(lr=0.1, steps=2))
    expected = seeded(maml.step, PARAMS, tasks(), from_torchjd(make(name)))
    found = seeded(collected, from_torchjd(make(name)), memory)
    assert_same(found, list(expected.update.values()), 1e-12)


def test_one_loss_cannot_hold_what_is_no_weighted_sum():
    pytest.importorskip("torchopt", reason="torchopt is not installed")
    from gradagree_opt.adapters.torchopt import weighted_loss

    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="found one whose update is no weighted sum; take"):
        weighted_loss([w.sum(), w.prod()], (w,), from_torchjd(jd.ConFIG()))
