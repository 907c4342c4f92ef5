"""Sine regression against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradagree_opt.tasks import Sine

MANY = 100_000
numbers = st.floats(-100, 100, width=32)
intervals = st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair)))


def assert_mean(sample, mean, variance):
    """The sample mean is within five of its standard deviations of the closed form."""
    assert abs(sample.mean().item() - mean) < 5 * math.sqrt(variance / sample.numel())


@given(
    amplitude=intervals,
    phase=intervals,
    frequency=intervals,
    x_range=intervals,
    seed=st.integers(0, 2**32),
)
def test_draws_stay_in_their_intervals(amplitude, phase, frequency, x_range, seed, seeded):
    bounds = (amplitude, phase, frequency, x_range)
    names = ("amplitude", "phase", "frequency", "x_range")
    sine = Sine(**dict(zip(names, bounds, strict=True)), dtype=torch.float64)
    parameters = sine.sample_parameters(50, seeded(seed))
    x, y = sine.sample(50, generator=seeded(seed))["query"]
    for draws, (low, high) in zip((*parameters, x), bounds, strict=True):
        assert low <= draws.min()
        assert draws.max() <= high
    assert (y.abs() <= parameters[0].abs()[:, None, None]).all()


@given(seed=st.integers(0, 2**32), frequency=st.sampled_from([(1.0, 1.0), (0.5, 0.5), (3.0, 6.0)]))
def test_targets_are_the_sines_of_the_drawn_parameters(seed, frequency, seeded):
    sine = Sine(frequency=frequency, dtype=torch.float64, support_shots=3, query_shots=4)
    drawn = torch.stack(sine.sample_parameters(5, seeded(seed)), 1).tolist()
    for x, y in sine.sample(5, generator=seeded(seed)).values():
        for task, (amplitude, phase, rate) in enumerate(drawn):
            expected = [
                amplitude * math.sin(rate * point + phase) for point in x[task, :, 0].tolist()
            ]
            assert y[task, :, 0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("interval", ["amplitude", "phase", "frequency", "x_range"])
def test_draws_have_the_mean_and_variance_of_a_uniform_distribution(interval, seeded):
    sine = Sine(frequency=(2.0, 3.5), dtype=torch.float64, support_shots=1)
    amplitude, phase, frequency = sine.sample_parameters(MANY, seeded(0))
    x, _ = sine.sample(MANY, generator=seeded(0))["support"]
    draws = {"amplitude": amplitude, "phase": phase, "frequency": frequency, "x_range": x}[interval]
    low, high = getattr(sine, interval)
    variance = (high - low) ** 2 / 12
    assert_mean(draws, (low + high) / 2, variance)
    assert_mean((draws - (low + high) / 2).square(), variance, (high - low) ** 4 / 180)


def test_targets_of_the_paper_have_mean_0_and_the_closed_variance(seeded):
    # over a full period the sine is independent of the input: E[y²] = E[a²] / 2
    low, high = 0.1, 5.0
    _, y = Sine(dtype=torch.float64, support_shots=1).sample(MANY, generator=seeded(1))["support"]
    second = (high**3 - low**3) / (high - low) / 3 / 2
    fourth = (high**5 - low**5) / (high - low) / 5 * 3 / 8
    assert_mean(y, 0, second)
    assert_mean(y.square(), second, fourth - second**2)


def test_targets_with_half_a_period_of_phase_have_the_closed_mean(seeded):
    # E[sin(x + φ)] = E[cos x] E[sin φ] = sin(5) / 5 · 2 / π, for x even and φ on [0, π]
    sine = Sine(phase=(0.0, math.pi), dtype=torch.float64, support_shots=1)
    _, y = sine.sample(MANY, generator=seeded(2))["support"]
    assert_mean(y, 2.55 * math.sin(5) / 5 * 2 / math.pi, y.var().item())


def test_one_call_for_many_tasks_is_as_many_independent_calls(seeded):
    reshaped = Sine(dtype=torch.float64).sample_parameters(MANY, seeded(3))[0].view(-1, 10)
    variance = (5 - 0.1) ** 2 / 12
    assert_mean((reshaped.mean(1) - 2.55).square(), variance / 10, 2 * (variance / 10) ** 2)
    neighbours = (reshaped[:, 0] - 2.55) * (reshaped[:, 1] - 2.55)
    assert_mean(neighbours, 0, variance**2)


def test_a_grid_query_is_the_whole_range_for_every_task(seeded):
    x, y = Sine(query="grid").sample(3, generator=seeded(4))["query"]
    expected = [-5 + 10 * step / 49 for step in range(50)]
    for task in x:
        assert task[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert y.shape == x.shape == (3, 50, 1)


def test_the_kind_of_query_leaves_support_sets_as_they_are(seeded):
    uniform = Sine(query="uniform").sample(3, generator=seeded(5))
    grid = Sine(query="grid").sample(3, generator=seeded(5))
    assert torch.equal(uniform["support"][0], grid["support"][0])
    assert torch.equal(uniform["support"][1], grid["support"][1])


def test_a_shuffled_grid_has_every_point_once_in_an_order_of_its_own(seeded):
    sine = Sine(support="shuffled_grid", support_shots=50)
    x, _ = sine.sample(100, generator=seeded(6))["support"]
    grid = torch.linspace(-5, 5, 50)
    assert torch.equal(x.squeeze(-1).sort(1).values, grid.expand(100, 50))
    assert len({tuple(task) for task in x.squeeze(-1).tolist()}) == 100


def test_a_shuffled_grid_puts_every_point_first_equally_often(seeded):
    sine = Sine(support="shuffled_grid", support_shots=5)
    x, _ = sine.sample(10_000, generator=seeded(7))["support"]
    _, counts = x[:, 0, 0].unique(return_counts=True)
    assert counts.tolist() == pytest.approx([2000] * 5, abs=5 * math.sqrt(2000 * 0.8))


def test_a_single_frequency_takes_nothing_from_the_generator(seeded):
    """Recorded studies see the tasks that they saw before there were frequencies."""
    generator = seeded(10)
    tasks = Sine(support_shots=2, query_shots=1).sample(3, generator=generator)
    draws = [3, 3, 6, 3]  # amplitudes, phases, support and query inputs
    bounds = [(0.1, 5.0), (0.0, 2 * math.pi), (-5.0, 5.0), (-5.0, 5.0)]
    by_hand = seeded(10)
    amplitude, phase, support, query = (
        torch.empty(number).uniform_(low, high, generator=by_hand)
        for number, (low, high) in zip(draws, bounds, strict=True)
    )
    assert torch.equal(generator.get_state(), by_hand.get_state())
    for part, inputs in (("support", support.view(3, 2, 1)), ("query", query.view(3, 1, 1))):
        x, y = tasks[part]
        assert torch.equal(x, inputs)
        assert torch.equal(y, amplitude[:, None, None] * torch.sin(x + phase[:, None, None]))


def test_generators_with_seeds_of_their_own_share_no_task(seeded):
    sine = Sine(dtype=torch.float64)
    phases = torch.cat([sine.sample_parameters(1000, seeded(seed))[1] for seed in (8, 9)])
    assert len(phases.unique()) == 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_have_the_dtype_asked_for(dtype, seeded):
    tasks = Sine(dtype=dtype, support="shuffled_grid", query="grid").sample(2, generator=seeded(0))
    assert {tensor.dtype for batch in tasks.values() for tensor in batch} == {dtype}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"amplitude": (5.0, 0.1)}, ValueError, r"expected amplitude to be .* found \(5.0, 0.1\)"),
        ({"phase": (0.0, math.inf)}, ValueError, "expected phase to be .* finite"),
        ({"phase": (math.nan, 1.0)}, ValueError, "expected phase to be .* finite"),
        ({"x_range": (-5.0, 0.0, 5.0)}, ValueError, r"expected x_range to be \(low, high\)"),
        ({"support_shots": 0}, ValueError, "expected support_shots to be at least 1, found 0"),
        ({"query_shots": -1}, ValueError, "expected query_shots to be at least 1, found -1"),
        ({"support": "grid"}, ValueError, "expected support to be one of .* found 'grid'"),
        ({"query": "shuffled_grid"}, ValueError, "expected query to be one of .* found"),
        ({"dtype": torch.int64}, TypeError, "expected a floating dtype, found torch.int64"),
    ],
)
def test_bad_options_are_named(options, error, sentence):
    with pytest.raises(error, match=sentence):
        Sine(**options)
