"""TorchJD's aggregators as ours: the same updates as its own, in every engine."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga

pytest.importorskip("torchjd", reason="torchjd is not installed")

from gradagree_opt.adapters.torchjd import GradientAgreement, from_torchjd
from torchjd import aggregation as jd

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # Nash

# From the Gramian, whatever the unit of the signals.
SCALE_FREE = {
    "AlignedMTL": lambda n: jd.AlignedMTL(),
    "CAGrad": lambda n: jd.CAGrad(c=0.5),
    "DualProj": lambda n: jd.DualProj(),
    "GradVac": lambda n: jd.GradVac(),
    "IMTLG": lambda n: jd.IMTLG(),
    "Krum": lambda n: jd.Krum(n_byzantine=1),
    "Mean": lambda n: jd.Mean(),
    "MGDA": lambda n: jd.MGDA(),
    "PCGrad": lambda n: jd.PCGrad(),
    "Random": lambda n: jd.Random(),
    "Sum": lambda n: jd.Sum(),
    "UPGrad": lambda n: jd.UPGrad(),
    "smoothed UPGrad": lambda n: jd.GramianWeightedAggregator(
        jd.CRMOGMWeighting(jd.UPGradWeighting())
    ),
    "ours": lambda n: GradientAgreement(),
}
# From the Gramian in the signals' own unit.
OF_UNITS = {
    "FairGrad": lambda n: jd.FairGrad(alpha=1.0),
    "NashMTL": lambda n: jd.NashMTL(n_tasks=n),
    "PCD": lambda n: jd.PCD(),
    "smoothed FairGrad": lambda n: jd.GramianWeightedAggregator(
        jd.CRMOGMWeighting(jd.FairGradWeighting(alpha=1.0))
    ),
}
OF_MATRIX = {
    "ConFIG": lambda n: jd.ConFIG(),
    "ExcessMTL": lambda n: jd.ExcessMTL(),
    "GradDrop": lambda n: jd.GradDrop(),
    "TrimmedMean": lambda n: jd.TrimmedMean(trim_number=1),
}
OF_GRAMIAN = SCALE_FREE | OF_UNITS
ALL = OF_GRAMIAN | OF_MATRIX


def make(name, n=4):
    try:
        return ALL[name](n)
    except ImportError as error:
        pytest.skip(str(error))


def matrix(seed=0, n=4, d=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def flat(tree):
    return torch.cat([leaf.detach().flatten() for leaf in tree_leaves(tree)])


def assert_same(actual, expected, tolerance):
    actual, expected = flat(actual).double(), flat(expected).double()
    assert (actual - expected).norm() <= tolerance * expected.norm()


def seeded(aggregator, *arguments):
    torch.manual_seed(0)  # PCGrad, GradVac, GradDrop and Random draw from the global generator
    return aggregator(*arguments)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-7)],  # solvers amplify the Gramian's rounding
    ids=["float32", "float64"],
)
def test_update_is_that_of_torchjd_on_the_matrix_batch_after_batch(name, dtype, tolerance):
    theirs, ours = make(name), from_torchjd(make(name))
    for seed in range(3):  # some keep a state
        jacobian = matrix(seed, dtype=dtype)
        stack = {"a": jacobian[:, :5].unflatten(1, (5, 1)), "b": jacobian[:, 5:]}
        assert_same(seeded(ours, stack), seeded(theirs, jacobian), tolerance)


@pytest.mark.parametrize("name", OF_GRAMIAN)
def test_weights_combine_the_rows(name):
    jacobian = matrix()
    result = seeded(from_torchjd(make(name)).aggregate, jacobian)
    assert_same(result.update, result.weights @ jacobian, 1e-12)
    torch.testing.assert_close(result.scores, jacobian @ jacobian.sum(0))


def test_constant_weights_are_taken_as_they_are():
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    result = from_torchjd(jd.Constant(weights)).aggregate(matrix())
    assert torch.equal(result.weights, weights.double())


@pytest.mark.parametrize("name", SCALE_FREE)
@settings(max_examples=5)
@given(st.integers(0, 1000), st.sampled_from([1e-100, 1e-6, 1e6, 1e100]))
def test_small_and_large_signals_get_the_weights_of_any_others(name, seed, scale):
    jacobian = matrix(seed)
    first = seeded(from_torchjd(make(name)).aggregate, jacobian).weights
    second = seeded(from_torchjd(make(name)).aggregate, scale * jacobian).weights
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["CAGrad", "UPGrad"])
def test_torchjds_own_norm_eps_is_met_where_the_scale_is_kept(name):
    small = 1e-6 * matrix()
    kept = from_torchjd(make(name), scale_free=False)
    assert_same(kept(small) + 1e-30, make(name)(small) + 1e-30, 1e-6)
    free = from_torchjd(make(name))
    assert (free(small) - make(name)(small)).norm() > 0.01 * free(small).norm()


@pytest.mark.parametrize("name", OF_UNITS)
def test_scale_free_weights_can_be_asked_for(name):
    jacobian = matrix()
    unit = jacobian.abs().max()
    aggregator = from_torchjd(make(name), scale_free=True)
    assert_same(seeded(aggregator, jacobian), unit * seeded(make(name), jacobian / unit), 1e-6)


def test_norm_is_matched_to_that_of_the_mean():
    jacobian = matrix()
    update = from_torchjd(make("UPGrad"), match_norm="mean")(jacobian)
    torch.testing.assert_close(update.norm(), jacobian.mean(0).norm())


# -- engines ---------------------------------------------------------------------------------------

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
    unit = 1.0 if name == "NashMTL" else measured.abs().max()
    scaled = measured / unit
    weights = seeded(weighting, scaled @ scaled.T) if weighting else theirs.weighting(scaled)
    assert_same(result.update, weights @ gradients, 1e-6)


@pytest.mark.parametrize("name", ["UPGrad", "ConFIG"])
def test_reptile_aggregates_displacements(name):
    reptile = ga.Reptile(loss_fn, ga.InnerSGD(lr=0.1, steps=2))
    result = reptile.step(PARAMS, tasks(), from_torchjd(make(name), nonfinite="raise"))
    displacements, _ = displacements_and_gradients(reptile)
    unit = displacements.abs().max()
    assert_same(result.update, unit * make(name)(displacements / unit), 1e-6)


@pytest.mark.parametrize("name", ["UPGrad", "TrimmedMean"])
def test_multi_task_engine_aggregates_gradients(name):
    batch = tasks()["support"]
    result = ga.aggregate_gradients(loss_fn, PARAMS, batch, from_torchjd(make(name)))
    gradients = ga.task_gradients(loss_fn, PARAMS, batch).gradients
    rows = torch.cat([leaf.flatten(1) for leaf in gradients.values()], 1)
    assert_same(result.update, make(name)(rows), 1e-6)


@pytest.mark.parametrize("name", OF_MATRIX)
def test_what_is_no_weighted_sum_sees_the_meta_gradients(name):
    maml = ga.MAML(loss_fn, ga.InnerSGD(lr=0.1, steps=2))
    result = seeded(maml.step, PARAMS, tasks(), from_torchjd(make(name)))
    _, gradients = displacements_and_gradients(maml)
    assert_same(result.update, seeded(make(name), gradients), 1e-6)
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


@pytest.mark.parametrize(
    ("name", "memory"), [("UPGrad", "graph"), ("UPGrad", "stream"), ("ConFIG", "stream")]
)
def test_collected_tasks_give_what_maml_gives(name, memory):
    maml = ga.MAML(loss_fn, ga.InnerSGD(lr=0.1, steps=2))
    expected = maml.step(PARAMS, tasks(), from_torchjd(make(name)))
    found = collected(from_torchjd(make(name)), memory)
    assert_same(found, list(expected.update.values()), 1e-12)


def test_what_is_no_weighted_sum_cannot_share_one_backward_pass():
    with pytest.raises(ValueError, match="found a single backward pass; give memory='stream'"):
        collected(from_torchjd(jd.ConFIG()), "graph")


def test_one_loss_cannot_hold_what_is_no_weighted_sum():
    torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")
    w = torch.ones(3, requires_grad=True)
    optimizer = ga.TaskOptimizer(
        torchopt.FuncOptimizer(torchopt.sgd(lr=0.1)), from_torchjd(jd.ConFIG())
    )
    with pytest.raises(ValueError, match="whose update is no weighted sum"):
        optimizer.functional_step(w * torch.arange(1.0, 4.0), (w,))


# -- tasks that are not finite ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["UPGrad", "PCGrad", "MGDA", "ConFIG", "TrimmedMean"])
def test_dropped_task_leaves_the_update_of_the_others(name):
    jacobian = matrix(n=6)
    others = jacobian[[0, 1, 2, 4, 5]]
    jacobian[3, 2] = torch.nan
    result = seeded(from_torchjd(make(name, 6), nonfinite="drop").aggregate, jacobian)
    assert_same(result.update, seeded(from_torchjd(make(name, 5)), others), 1e-9)
    assert result.diagnostics.nonfinite.tolist() == [False] * 3 + [True] + [False] * 2


@pytest.mark.parametrize("name", ["UPGrad", "NashMTL", "ConFIG"])
def test_task_that_is_not_finite_is_named_before_torchjd_sees_it(name):
    jacobian = matrix()
    jacobian[1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"found NaN or inf in tasks \[1\]"):
        from_torchjd(make(name))(jacobian)
    assert from_torchjd(make(name), nonfinite="propagate")(jacobian).isnan().all()


@pytest.mark.parametrize("name", ["UPGrad", "ConFIG"])
def test_batch_without_a_finite_task_gives_a_zero_update(name):
    aggregator = from_torchjd(make(name), nonfinite="drop")
    assert torch.equal(aggregator(torch.full((3, 2), torch.nan)), torch.zeros(2))


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [jd.MGDAWeighting(), jd.MGDA, ga.GradientAgreement()])
def test_what_is_no_torchjd_aggregator_is_refused(wrong, without_type_checks):
    with pytest.raises(TypeError, match=r"aggregator as UPGrad\(\), found .*; wrap a weighting"):
        from_torchjd(wrong)


@pytest.mark.parametrize("option", [{"match_norm": "mean"}, {"scale_free": True}])
def test_options_of_a_gramian_are_refused_for_a_matrix(option):
    with pytest.raises(ValueError, match="for ConFIG, found one of them"):
        from_torchjd(jd.ConFIG(), **option)
