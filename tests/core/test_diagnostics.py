"""Every diagnostic against NumPy in float64."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import gradagree_opt as ga
from gradagree_opt.core.diagnostics import Diagnostics
from gradagree_testing.configurations import CONFIGURATIONS, Configuration
from gradagree_testing.looping import every
from gradagree_testing.samplers import SAMPLERS, Sampler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def computed(matrix: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """The diagnostics of a matrix and its weights by their definitions; all but degenerate."""
    update, mean = weights @ matrix, matrix.mean(0)
    squares = (matrix**2).sum(1)
    values = {
        "weight_sum": weights.sum(),
        "smallest_weight": weights.min(),
        "negative_share": sum(weight < 0 for weight in weights) / len(weights),
        "effective_tasks": abs(weights).sum() ** 2 / (weights**2).sum() if weights.any() else 0.0,
        "update_norm": np.linalg.norm(update),
    }
    if squares.any():
        lengths = np.linalg.norm(matrix, axis=1)
        values["cancellation"] = np.linalg.norm(matrix.sum(0)) / lengths.sum()
        values["update_to_mean"] = np.linalg.norm(update) / np.linalg.norm(mean)
    if np.ptp(weights) > 1e-9 and np.ptp(squares) > 1e-9 * squares.max():
        values["norm_correlation"] = np.corrcoef(weights, squares)[0, 1]
    return values


CANCELLING = ("opposite", "all_zero")


@every(configuration=CONFIGURATIONS, sampler=[s for s in SAMPLERS if s.__name__ not in CANCELLING])
def test_diagnostics_are_what_their_definitions_give(
    configuration: Configuration, sampler: Sampler
):
    matrix = sampler(seeded())
    result = configuration.make().aggregate(matrix)
    expected = computed(matrix.numpy(), result.weights.numpy())
    for name, value in expected.items():
        found = getattr(result.diagnostics, name).item()
        assert found == pytest.approx(value, rel=1e-9, abs=1e-12), name


@every(
    aggregator=[ga.GradientAgreement(), ga.EqualAgreement(), ga.NormShare()],
    scale=[1e-30, *(10.0**power for power in range(-11, 17)), 1e30],
)
def test_diagnostics_are_right_at_every_scale_of_float32(aggregator: ga.Aggregator, scale: float):
    matrix = torch.randn(6, 9, generator=seeded()) * scale
    result = aggregator.aggregate(matrix)
    expected = computed(matrix.double().numpy(), result.weights.double().numpy())
    for name, value in expected.items():
        assert getattr(result.diagnostics, name).item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("times", [1e-22, 1e-11, 1e8, 1e12, 1e22])
def test_diagnostics_are_right_beside_one_task_of_another_scale(times: float):
    matrix = torch.randn(5, 9, generator=seeded())
    matrix[2] *= times
    result = ga.EqualAgreement().aggregate(matrix)
    expected = computed(matrix.double().numpy(), result.weights.double().numpy())
    for name, value in expected.items():
        found = getattr(result.diagnostics, name).item()
        assert found == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_signals_that_point_one_way_do_not_cancel_and_opposite_ones_cancel_wholly():
    one_way = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.3, 0.4]])
    assert_close(ga.Mean().aggregate(one_way).diagnostics.cancellation.item(), 1.0)
    opposite = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    assert ga.Mean().aggregate(opposite).diagnostics.cancellation < 1e-3
    assert ga.Mean().aggregate(torch.zeros(2, 2)).diagnostics.cancellation == 0


def test_the_mean_has_n_effective_tasks_and_one_task_alone_has_one():
    assert_close(ga.Mean().aggregate(torch.randn(9, 3)).diagnostics.effective_tasks.item(), 9.0)
    alone = torch.zeros(9, 3)
    alone[4] = 1.0
    diagnostics = ga.GradientAgreement().aggregate(alone).diagnostics
    assert_close(diagnostics.effective_tasks.item(), 1.0)


@every(scope=["global", "leaf"])
def test_weights_that_are_all_zero_are_those_of_no_task_and_have_no_ratio(scope: str):
    zeros = {"w": torch.zeros(3, 2), "b": torch.zeros(3)}
    aggregator = ga.GradientAgreement(degenerate="zero", scope=scope)
    diagnostics = aggregator.aggregate(zeros).diagnostics
    for name in ("weight_sum", "smallest_weight", "negative_share", "effective_tasks"):
        assert not getattr(diagnostics, name).any(), name
    assert not diagnostics.cancellation.any() and diagnostics.update_norm == 0
    assert diagnostics.update_to_mean.isnan() and diagnostics.norm_correlation.isnan().all()
    assert diagnostics.degenerate.all()


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 10, 11, 13, 100])
def test_constant_weights_correlate_with_nothing(n: int):
    for aggregator in (ga.Mean(), ga.Sum()):
        diagnostics = aggregator.aggregate(torch.randn(n, 4, generator=seeded(n))).diagnostics
        assert diagnostics.norm_correlation.isnan()


def test_weights_by_squared_norm_correlate_fully_with_it():
    diagnostics = ga.NormShare().aggregate(torch.randn(9, 3, generator=seeded())).diagnostics
    assert_close(diagnostics.norm_correlation.item(), 1.0)


def test_the_ratio_to_the_mean_is_unknown_where_the_directions_are_not_the_signal():
    directions, signal = torch.randn(4, 3, generator=seeded()), torch.randn(4, 3)
    diagnostics = ga.GradientAgreement().aggregate(directions, signal).diagnostics
    assert diagnostics.update_to_mean.isnan()
    update = ga.GradientAgreement().aggregate(directions, signal).update
    assert_close(diagnostics.update_norm, update.norm())


def test_signal_diagnostics_are_of_the_signal_and_weight_diagnostics_of_the_weights():
    directions, signal = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4).double()
    result = ga.GradientAgreement().aggregate(directions, signal)
    expected = computed(signal.numpy(), result.weights.numpy())
    for name in (
        "weight_sum",
        "smallest_weight",
        "negative_share",
        "effective_tasks",
        "cancellation",
        "norm_correlation",
    ):
        assert_close(getattr(result.diagnostics, name).item(), float(expected[name]))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_with_groups_each_has_its_diagnostics_and_the_update_has_one_norm(scale: float):
    grads = {
        "w": torch.randn(5, 6, generator=seeded()) * scale,
        "b": torch.randn(5, 2, generator=seeded(1)),
    }
    result = ga.GradientAgreement(scope="leaf").aggregate(grads)
    for group, leaf in enumerate(tree_leaves(grads)):
        alone = ga.GradientAgreement().aggregate(leaf).diagnostics
        for name in (
            "weight_sum",
            "smallest_weight",
            "negative_share",
            "effective_tasks",
            "cancellation",
            "norm_correlation",
            "degenerate",
        ):
            assert_close(getattr(result.diagnostics, name)[group], getattr(alone, name))
    update = torch.cat([leaf.double() for leaf in tree_leaves(result.update)])
    mean = torch.cat([leaf.double().mean(0) for leaf in tree_leaves(grads)])
    assert_close(result.diagnostics.update_norm.double(), update.norm(), rtol=1e-5, atol=0)
    assert_close(
        result.diagnostics.update_to_mean.double(), update.norm() / mean.norm(), rtol=1e-5, atol=0
    )


def test_log_gives_the_diagnostics_as_a_flat_dict_of_floats():
    matrix = torch.randn(6, 4, generator=seeded(), dtype=torch.float64)
    matrix[1] = torch.inf
    result = ga.EqualAgreement(nonfinite="drop").aggregate(matrix)
    logged = result.diagnostics.log()
    assert all(type(value) is float for value in logged.values())
    fields = result.diagnostics._asdict()
    del fields["nonfinite"]
    assert logged.pop("nonfinite_tasks") == 1.0
    assert logged.keys() == fields.keys()
    for name, value in logged.items():
        assert value == pytest.approx(float(fields[name]), rel=1e-6), name


def test_log_leaves_out_what_was_not_measured():
    logged = ga.Mean().aggregate(torch.randn(3, 2), torch.randn(3, 2)).diagnostics.log()
    assert "update_to_mean" not in logged
    assert "norm_correlation" not in logged
    assert not any(math.isnan(value) for value in logged.values())


def test_log_averages_over_groups():
    grads = {"a": torch.tensor([[1.0], [1.0]]), "b": torch.tensor([[1.0], [-0.5]])}
    result = ga.GradientAgreement(scope="leaf").aggregate(grads)
    assert result.diagnostics.weight_sum.tolist() == pytest.approx([1.0, 1 / 3])
    assert result.diagnostics.log()["weight_sum"] == pytest.approx(2 / 3)


def test_log_averages_over_the_groups_in_which_a_value_is_defined():
    grads = {"a": torch.tensor([[1.0], [2.0], [4.0]]), "b": torch.zeros(3, 1)}
    diagnostics = ga.GradientAgreement(scope="leaf").aggregate(grads).diagnostics
    assert diagnostics.norm_correlation[1].isnan()
    logged = diagnostics.log()["norm_correlation"]
    assert logged == pytest.approx(float(diagnostics.norm_correlation[0]), rel=1e-6)


def test_log_shows_a_batch_that_is_not_finite():
    grads = torch.tensor([[math.nan], [1.0]])
    logged = ga.GradientAgreement(nonfinite="propagate").aggregate(grads).diagnostics.log()
    assert math.isnan(logged["update_norm"]) and logged["nonfinite_tasks"] == 1
    assert "cancellation" not in logged


def test_log_reads_the_device_once(host_reads: list[str]):
    diagnostics = ga.GradientAgreement().aggregate(torch.randn(3, 2)).diagnostics
    host_reads.clear()
    diagnostics.log()
    assert len(host_reads) <= 1


def test_a_logged_value_is_not_moved_by_later_changes_of_the_gradients():
    grads: Tensor = torch.randn(3, 2, generator=seeded())
    diagnostics = ga.GradientAgreement().aggregate(grads).diagnostics
    before = diagnostics.log()
    grads.zero_()
    assert diagnostics.log() == before


def test_diagnostics_that_are_computed_when_looked_at_are_those_computed_at_once():
    stack = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    aggregator = ga.EqualAgreement()
    with FlopCounterMode(display=False):  # under a mode, which would miss later operations
        at_once = aggregator.aggregate(stack).diagnostics
    later = aggregator.aggregate(stack).diagnostics
    assert type(at_once) is Diagnostics
    assert isinstance(later, Diagnostics) and type(later) is not Diagnostics
    torch.testing.assert_close(later.update_norm, at_once.update_norm)
    assert len(later) == len(at_once) and later == later
    plain = (
        Diagnostics(*later),
        pickle.loads(pickle.dumps(later)),
        copy.deepcopy(later),
        tree_map(torch.clone, later),
        later._replace(),
    )
    for found in plain:
        assert type(found) is Diagnostics
        torch.testing.assert_close(found, at_once)
    values = [*later]
    beside = sum([later], ("step",))
    for joined in (beside[1:], (later * 2)[len(later) :], (2 * later)[: len(later)]):
        assert all(found is value for found, value in zip(joined, values, strict=True))
    assert later.index(values[0]) == 0
    assert repr(later) == repr(at_once)
    assert later.log() == pytest.approx(at_once.log())
