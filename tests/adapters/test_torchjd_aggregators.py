"""TorchJD's aggregators as ours: the same updates as its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradagree_opt as ga

pytest.importorskip("torchjd", reason="torchjd is not installed")

from gradagree_opt.adapters.torchjd import from_torchjd
from torchjd import aggregation as jd

from .torchjd_cases import (
    ALL,
    OF_GRAMIAN,
    OF_UNITS,
    SCALE_FREE,
    assert_same,
    make,
    matrix,
    seeded,
)

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # Nash


# Solvers that stop at a tolerance of their own, and GradVac's eps, which does not scale.
INEXACT = {"CAGrad": 1e-10, "GradVac": 1e-7, "NashMTL": 1e-9}


def test_every_aggregator_of_torchjd_is_tried():
    bases = {jd.Aggregator, jd.GramianWeightedAggregator, jd.WeightedAggregator, jd.Constant}
    public = [getattr(jd, name) for name in jd.__all__]
    aggregators = {c for c in public if isinstance(c, type) and issubclass(c, jd.Aggregator)}
    assert {c.__name__ for c in aggregators - bases} <= ALL.keys()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_update_is_that_of_torchjd_on_the_matrix_batch_after_batch(name, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else INEXACT.get(name, 1e-12)
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


@pytest.mark.parametrize("name", ["UPGrad", "GradVac", "ConFIG", "ExcessMTL"])
@pytest.mark.parametrize("scale", [1e-30, 1.0])
def test_torchjd_is_asked_once_about_a_batch_of_any_scale(name, scale):
    """Some remember what they are given, or draw: asked twice, they would answer otherwise."""
    aggregator, asked = make(name), []
    module = getattr(aggregator, "gramian_weighting", aggregator)
    module.register_forward_hook(lambda *_: asked.append(True))
    from_torchjd(aggregator, nonfinite="raise").aggregate(scale * matrix(dtype=torch.float32))
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["ConFIG", "ExcessMTL", "TrimmedMean"])
def test_matrices_of_half_precision_are_given_to_torchjd_in_float32(name):
    coarse = matrix().bfloat16()
    found, expected = from_torchjd(make(name))(coarse), make(name)(coarse.float())
    assert torch.equal(found, expected.bfloat16())


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
    unit = jacobian.norm(dim=1).max()
    expected = unit * seeded(make(name), jacobian / unit)
    for scale in (1, 3, 1e-6):
        aggregator = from_torchjd(make(name), scale_free=True)
        assert_same(seeded(aggregator, scale * jacobian), scale * expected, 1e-6)


def test_norm_is_matched_to_that_of_the_mean():
    jacobian = matrix()
    update = from_torchjd(make("UPGrad"), match_norm="mean")(jacobian)
    torch.testing.assert_close(update.norm(), jacobian.mean(0).norm())


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


# -- tasks that TorchJD does not take --------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("of", ["gradients", "displacements"])
def test_a_batch_without_any_signal_is_a_zero_update(name, of):
    aggregator, zeros = from_torchjd(make(name)), torch.zeros(4, 5)
    if of == "gradients":
        result = seeded(aggregator.aggregate, zeros)
    else:  # every task is solved: its inner and its outer gradients are zero
        maml = ga.MAML(lambda w, x: (w - x).square().sum(), ga.InnerSGD(0.1, 1))
        result = maml.step(zeros[0], {"support": zeros, "query": zeros}, aggregator)
    assert torch.equal(result.update, zeros[0])


def test_nash_mtl_tells_a_batch_without_any_signal_and_goes_on_as_before_it():
    aggregator = from_torchjd(make("NashMTL"))
    result = aggregator.aggregate(torch.zeros(4, 12, dtype=torch.float64))
    assert result.diagnostics.degenerate
    assert torch.equal(result.weights, torch.zeros(4, dtype=torch.float64))
    result = aggregator.aggregate(matrix())
    assert not result.diagnostics.degenerate
    assert_same(result.update, make("NashMTL")(matrix()), 1e-9)


@pytest.mark.parametrize(
    "aggregator",
    [lambda: make("NashMTL"), lambda: jd.Constant(torch.ones(4)), lambda: jd.TrimmedMean(2)],
    ids=["NashMTL", "Constant", "TrimmedMean"],
)
def test_another_number_of_tasks_is_refused_in_one_sentence(aggregator):
    with pytest.raises(ValueError, match=r"^expected tasks .*, found 3 of .*; give it the number"):
        from_torchjd(aggregator()).aggregate(matrix(n=3))


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (jd.MGDAWeighting(), "MGDAWeighting of torchjd.*; wrap a weighting as Gramian"),
        (jd.MGDA, "the class MGDA; call it"),
        (ga.GradientAgreement(), "GradientAgreement of gradagree_opt.*library as it is"),
    ],
)
def test_what_is_no_torchjd_aggregator_is_refused(wrong, found, without_type_checks):
    with pytest.raises(TypeError, match=rf"aggregator as UPGrad\(\), found {found}"):
        from_torchjd(wrong)


@pytest.mark.parametrize("wrong", [jd.UPGrad(), jd.TrimmedMean(1), jd.MGDAWeighting()])
def test_what_is_torchjds_is_no_weighting_as_it_is(wrong):
    with pytest.raises(TypeError, match=f"found {type(wrong).__name__} of torchjd.*from_torchjd"):
        ga.Aggregator(wrong)


@pytest.mark.parametrize("option", [{"match_norm": "mean"}, {"scale_free": True}])
def test_options_of_a_gramian_are_refused_for_a_matrix(option):
    with pytest.raises(ValueError, match="for ConFIG, found one of them"):
        from_torchjd(jd.ConFIG(), **option)
