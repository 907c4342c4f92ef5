"""Tasks that are not finite, and signals that cancel."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

import gradagree_opt as ga
from gradagree_testing.configurations import CONFIGURATIONS, Configuration
from gradagree_testing.looping import every

BAD = [torch.nan, torch.inf, -torch.inf]
DETERMINISTIC = [c for c in CONFIGURATIONS if c.name != "random"]


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spoilt(matrix: Tensor, tasks: list[int], value: float) -> Tensor:
    matrix = matrix.clone()
    for position, task in enumerate(tasks):
        matrix[task, position % matrix.shape[1]] = value
    return matrix


class TestRaise:
    @every(configuration=CONFIGURATIONS, value=BAD)
    def test_names_the_offending_tasks(self, configuration: Configuration, value: float):
        grads = {"w": spoilt(rows(6, 3), [4], value), "b": spoilt(rows(6, 2), [1, 4], value)}
        with pytest.raises(ValueError, match=r"expected finite values .* found .* tasks \[1, 4\];"):
            configuration.make().aggregate(grads)

    def test_looks_at_signals_and_at_directions(self):
        directions, signal = spoilt(rows(4, 3), [0], torch.nan), spoilt(rows(4, 5), [2], torch.inf)
        agreement = ga.GradientAgreement()
        with pytest.raises(ValueError, match=re.escape("tasks [0, 2]")):
            agreement.aggregate(directions, signal)
        with pytest.raises(ValueError, match=re.escape("tasks [0]")):
            agreement.aggregate(directions, rows(4, 5))
        with pytest.raises(ValueError, match=re.escape("tasks [2]")):
            agreement.aggregate(rows(4, 3), signal)

    def test_an_update_that_overflows_is_named_as_such(self):
        grads = torch.full((1000, 2), 60_000.0, dtype=torch.float16)
        with pytest.raises(ValueError, match="expected a finite update"):
            ga.Sum().aggregate(grads)

    def test_finite_tasks_pass_with_one_read_on_the_host(self, host_reads: list[str]):
        ga.GradientAgreement().aggregate(rows(6, 3))
        assert len(host_reads) <= 1


class TestDrop:
    @every(configuration=DETERMINISTIC, value=BAD, spoil=["directions", "signal", "both"])
    def test_is_the_aggregation_of_the_remaining_tasks(
        self, configuration: Configuration, value: float, spoil: str
    ):
        directions, signal = {"w": rows(7, 4, 2), "b": rows(7, seed=1)}, rows(7, 9, seed=2)
        bad, kept = [0, 5], [1, 2, 3, 4, 6]
        rest = configuration.make().aggregate(
            tree_map(lambda leaf: leaf[kept], directions), signal[kept]
        )
        if spoil != "signal":
            directions["b"][5] = value
            directions["w"][0, 1, 1] = value
        if spoil != "directions":
            signal = spoilt(signal, bad, value)
        result = configuration.make(nonfinite="drop").aggregate(directions, signal)
        assert_close(result.update, rest.update)
        assert_close(result.weights[kept], rest.weights)
        assert_close(result.scores[kept], rest.scores)
        assert result.weights[bad].tolist() == [0.0, 0.0]
        assert result.diagnostics.nonfinite.nonzero().flatten().tolist() == bad

    @every(configuration=DETERMINISTIC)
    def test_without_a_signal_is_the_aggregation_of_the_remaining_tasks_and_so_are_its_diagnostics(
        self, configuration: Configuration
    ):
        grads, kept = rows(6, 8), [0, 1, 3, 4]
        rest = configuration.make().aggregate(grads[kept])
        result = configuration.make(nonfinite="drop").aggregate(spoilt(grads, [2, 5], torch.nan))
        assert_close(result.update, rest.update)
        assert_close(result.weights[kept], rest.weights)
        for name in ga.Diagnostics._fields:
            if name != "nonfinite":
                found, expected = (getattr(each.diagnostics, name) for each in (result, rest))
                torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, equal_nan=True)

    def test_random_weights_are_shared_by_the_remaining_tasks(self):
        random = ga.RandomWeights(torch.Generator().manual_seed(0), nonfinite="drop")
        weights = random.aggregate(spoilt(rows(5, 3), [1], torch.nan)).weights
        assert weights[1] == 0
        assert (weights[[0, 2, 3, 4]] > 0).all()
        assert_close(weights.sum().item(), 1.0)

    @every(configuration=CONFIGURATIONS)
    def test_all_tasks_dropped_gives_an_update_of_zero(self, configuration: Configuration):
        grads = {"w": torch.full((3, 2), torch.nan), "b": rows(3)}
        result = configuration.make(nonfinite="drop").aggregate(grads)
        assert all((leaf == 0).all() for leaf in tree_leaves(result.update))
        assert result.weights.tolist() == [0.0, 0.0, 0.0]
        assert result.diagnostics.nonfinite.all()
        assert not any(math.isinf(value) for value in result.diagnostics.log().values())

    @every(configuration=CONFIGURATIONS)
    def test_of_no_task_changes_nothing(self, configuration: Configuration):
        grads = rows(6, 3)
        dropped = configuration.make(nonfinite="drop").aggregate(grads)
        assert_close(dropped[:3], configuration.make().aggregate(grads)[:3])

    def test_reads_nothing_on_the_host(self, host_reads: list[str]):
        ga.GradientAgreement(nonfinite="drop").aggregate(spoilt(rows(6, 3), [], 0.0))
        assert host_reads == []


class TestPropagate:
    @every(configuration=CONFIGURATIONS, value=BAD)
    def test_gives_an_update_that_gradscaler_finds_to_be_not_finite(
        self, configuration: Configuration, value: float
    ):
        grads = spoilt(rows(4, 3), [2], value)
        result = configuration.make(nonfinite="propagate").aggregate(grads)
        assert not result.update.isfinite().all()
        assert result.diagnostics.nonfinite.tolist() == [False, False, True, False]

    @pytest.mark.parametrize("value", BAD)
    def test_gives_nan_where_weights_depend_on_the_task(self, value: float):
        result = ga.GradientAgreement(nonfinite="propagate").aggregate(
            spoilt(rows(4, 3), [2], value)
        )
        assert result.update.isnan().all()
        assert result.weights.isnan().any()

    def test_a_signal_that_is_not_finite_shows_in_the_update(self):
        signal = spoilt(rows(4, 3), [1], torch.nan)
        result = ga.GradientAgreement(nonfinite="propagate").aggregate(rows(4, 2), signal)
        assert not result.update.isfinite().any()

    @every(configuration=CONFIGURATIONS)
    def test_reads_nothing_on_the_host(self, configuration: Configuration, host_reads: list[str]):
        aggregator = configuration.make(nonfinite="propagate")
        aggregator.aggregate(rows(6, 3))
        aggregator.aggregate({"w": rows(6, 3)}, signal=rows(6, 2))
        assert host_reads == []


class TestKnownByOtherMeans:
    LOST = torch.tensor([False, True, False, False])

    def test_drop_leaves_such_tasks_out_although_their_gradients_are_finite(self):
        grads = rows(4, 3)
        aggregator = ga.GradientAgreement(nonfinite="drop")
        result = aggregator.aggregate_unchecked(grads, nonfinite=self.LOST)
        rest = ga.GradientAgreement().aggregate(grads[[0, 2, 3]])
        assert result.weights[1] == 0
        assert_close(result.update, rest.update)

    def test_drop_leaves_out_what_it_finds_itself_too(self):
        aggregator = ga.GradientAgreement(nonfinite="drop")
        result = aggregator.aggregate_unchecked(
            rows(4, 3), spoilt(rows(4, 2), [3], torch.nan), nonfinite=self.LOST
        )
        assert result.diagnostics.nonfinite.tolist() == [False, True, False, True]
        assert (result.weights == 0).tolist() == [False, True, False, True]

    def test_raise_names_them(self):
        aggregator = ga.GradientAgreement()
        result = aggregator.aggregate_unchecked(rows(4, 3), nonfinite=self.LOST)
        with pytest.raises(ValueError, match=re.escape("tasks [1]")):
            aggregator.verify(result)


ZEROS = torch.zeros(4, 3)
OPPOSITE = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])


class TestDegenerate:
    @pytest.mark.parametrize("grads", [ZEROS, OPPOSITE, OPPOSITE * 1e30, OPPOSITE * 1e-30])
    def test_uniform_gives_uniform_weights_and_no_step(self, grads: Tensor):
        result = ga.GradientAgreement().aggregate(grads)
        assert_close(result.weights, torch.full_like(grads[:, 0], 1 / len(grads)))
        assert result.update.tolist() == [0.0, 0.0, 0.0]
        assert result.diagnostics.degenerate

    @pytest.mark.parametrize("grads", [ZEROS, OPPOSITE])
    @pytest.mark.parametrize("normalization", ["l1", "softmax"])
    def test_zero_gives_zero_weights(self, grads: Tensor, normalization: Any):
        agreement = ga.GradientAgreement(degenerate="zero", normalization=normalization)
        result = agreement.aggregate(grads)
        assert result.weights.tolist() == [0.0] * len(grads)
        assert result.update.tolist() == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("grads", [ZEROS, OPPOSITE])
    def test_raise_says_that_the_scores_cancel(self, grads: Tensor):
        agreement = ga.GradientAgreement(degenerate="raise")
        with pytest.raises(ValueError, match=r"scores that cancel to zero .*'uniform' or 'zero'"):
            agreement.aggregate(grads)

    def test_raise_in_one_group_is_enough(self):
        agreement = ga.GradientAgreement(degenerate="raise", scope="leaf")
        with pytest.raises(ValueError, match="cancel to zero"):
            agreement.aggregate([rows(2, 3), OPPOSITE])

    def test_raise_lets_signals_that_do_not_cancel_through(self):
        grads = rows(5, 3)
        raising = ga.GradientAgreement(degenerate="raise").aggregate(grads)
        assert_close(raising.weights, ga.GradientAgreement().aggregate(grads).weights)

    def test_raise_reports_tasks_that_are_not_finite_first(self):
        agreement = ga.GradientAgreement(degenerate="raise")
        with pytest.raises(ValueError, match=re.escape("tasks [1]")):
            agreement.aggregate(spoilt(ZEROS, [1], torch.nan))

    def test_two_signals_with_the_uniform_fallback_move_other_directions_by_their_mean(self):
        directions = rows(2, 4)
        update = ga.GradientAgreement().aggregate(directions, signal=OPPOSITE).update
        assert_close(update, directions.mean(0))

    @every(seed=range(20), scale=[1e-30, 1.0, 1e30])
    def test_signals_opposite_up_to_rounding_give_the_fallback_and_never_noise(
        self, seed: int, scale: float
    ):
        signal = rows(1, 50, seed=seed, dtype=torch.float32)
        noise = 1 + 1e-7 * (2 * torch.rand(1, 50) - 1)
        result = ga.GradientAgreement().aggregate(torch.cat([signal, -signal * noise]) * scale)
        assert result.diagnostics.degenerate
        assert result.weights.tolist() == [0.5, 0.5]
        assert result.update.double().norm() < 1e-6 * scale * signal.norm()

    @pytest.mark.parametrize("n", [3, 10, 100, 1000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_many_signals_that_cancel_up_to_rounding_give_the_fallback(
        self, n: int, dtype: torch.dtype
    ):
        signals = rows(n, 20, seed=n, dtype=dtype)
        signals -= signals.mean(0)
        assert ga.GradientAgreement().aggregate(signals).diagnostics.degenerate

    @pytest.mark.parametrize("n", [10, 100, 1000])
    def test_many_equal_signals_and_then_as_many_opposite_ones_give_the_fallback(self, n: int):
        signal = rows(1, 20, dtype=torch.float32)
        signals = torch.cat([signal.expand(n // 2, -1), -signal.expand(n // 2, -1)])
        assert ga.GradientAgreement().aggregate(signals).diagnostics.degenerate

    @pytest.mark.parametrize("n", [2, 4, 10, 100, 1000])
    @pytest.mark.parametrize("disagreement", [1e-3, 1e-2])
    def test_one_small_disagreement_among_opposite_signals_is_no_rounding(
        self, n: int, disagreement: float
    ):
        signal = rows(1, 20, dtype=torch.float32)
        signals = torch.cat([signal, -signal]).repeat(n // 2, 1)
        signals[0] *= 1 + disagreement
        result = ga.GradientAgreement().aggregate(signals)
        assert not result.diagnostics.degenerate
        expected = torch.tensor([1.0, -1.0]).repeat(n // 2) / n
        assert_close(result.weights, expected, rtol=2 * disagreement, atol=0)

    @every(seed=range(10))
    def test_two_signals_that_differ_by_a_thousandth_are_weighted_by_their_difference(
        self, seed: int
    ):
        signal, difference = rows(2, 50, seed=seed, dtype=torch.float32)
        result = ga.GradientAgreement().aggregate(
            torch.stack([signal, -signal + 1e-3 * signal.norm() * difference / difference.norm()])
        )
        assert not result.diagnostics.degenerate
        assert_close(result.update.norm() / signal.norm(), torch.tensor(1.0), rtol=0, atol=0.01)


def test_a_policy_holds_for_the_update_alone():
    call: Callable[[Tensor], Any] = ga.GradientAgreement()
    with pytest.raises(ValueError, match=re.escape("tasks [0]")):
        call(spoilt(rows(2, 2), [0], torch.nan))
    with pytest.raises(ValueError, match=re.escape("tasks [0]")):
        ga.agreement_weights(spoilt(rows(2, 2), [0], torch.nan))
    with pytest.raises(ValueError, match="cancel"):
        ga.agreement_weights(OPPOSITE, degenerate="raise")
