"""Corruption of training tasks against the clean tasks of the same generator."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradagree_opt.tasks import Corrupted, Lines, Omniglot, Sine
from gradagree_opt.tasks.corrupted import Corruption

SINE = Sine(support_shots=6, query_shots=4)
MANY = 4000


def clean_tasks(seeded, seed, n=MANY):
    return SINE.sample(n, generator=seeded(seed))


def spoilt_rows(tasks, clean):
    """Which tasks differ from the clean ones, once for the support and once for the query sets."""
    return [
        sum((a != b).flatten(1).any(1) for a, b in zip(tasks[part], clean[part], strict=True)) > 0
        for part in ("support", "query")
    ]


@pytest.mark.parametrize("fraction", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["label_noise", "outlier_scale", "foreign"])
def test_each_task_is_spoilt_as_a_whole_with_the_given_probability(kind, fraction, seeded):
    foreign = Lines(inputs=SINE) if kind == "foreign" else None
    spoilt = Corrupted(SINE, kind=kind, fraction=fraction, foreign=foreign)
    support, query = spoilt_rows(
        spoilt.sample(MANY, generator=seeded(0)), clean_tasks(seeded, seed=0)
    )
    assert torch.equal(support, query)
    deviation = math.sqrt(fraction * (1 - fraction) * MANY)
    assert abs(support.sum().item() - fraction * MANY) <= 5 * deviation
    pairs = (support[::2] & support[1::2]).sum().item()  # neighbours are independent
    assert abs(pairs - fraction**2 * MANY / 2) <= 5 * math.sqrt(fraction**2 * MANY / 2) * (
        fraction < 1
    )


def test_all_kinds_spoil_the_same_tasks_of_a_generator(seeded):
    clean = clean_tasks(seeded, 1)
    rows = [
        spoilt_rows(
            Corrupted(SINE, kind=kind, fraction=0.3, foreign=foreign).sample(
                MANY, generator=seeded(1)
            ),
            clean,
        )[0]
        for kind, foreign in (
            ("outlier_scale", None),
            ("label_noise", None),
            ("foreign", Lines(inputs=SINE)),
        )
    ]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    shuffled = Corrupted(SINE, kind="shuffled_labels", fraction=0.3)
    moved = spoilt_rows(shuffled.sample(MANY, generator=seeded(1)), clean)[0]
    assert not (moved & ~rows[0]).any()  # a permutation may leave all where it is, one in 6! does
    assert (rows[0] & ~moved).sum() < 20


@pytest.mark.parametrize("kind", get_args(Corruption))
@pytest.mark.parametrize("split", ["validation", "test"])
def test_validation_and_test_are_those_of_the_base(kind, split, seeded):
    foreign = Lines(inputs=SINE) if kind == "foreign" else None
    spoilt = Corrupted(SINE, kind=kind, fraction=1.0, foreign=foreign)
    generators = seeded(2), seeded(2)
    found = spoilt.sample(50, split=split, generator=generators[0])
    expected = SINE.sample(50, split=split, generator=generators[1])
    for part in ("support", "query"):
        assert all(torch.equal(a, b) for a, b in zip(found[part], expected[part], strict=True))
    assert torch.equal(*(generator.get_state() for generator in generators))


def test_shuffled_labels_are_the_tasks_own_and_no_function_of_the_inputs(seeded):
    spoilt = Corrupted(SINE, kind="shuffled_labels", fraction=1.0)
    tasks, clean = spoilt.sample(MANY, generator=seeded(3)), clean_tasks(seeded, 3)
    for part in ("support", "query"):
        (x, y), (clean_x, clean_y) = tasks[part], clean[part]
        assert torch.equal(x, clean_x)
        assert torch.equal(y.sort(1).values, clean_y.sort(1).values)
        # each target goes to each place equally often
        examples = y.shape[1]
        places = (y == clean_y[:, :1]).squeeze(2).sum(0)
        expected = MANY / examples
        assert ((places - expected).abs() < 5 * math.sqrt(expected)).all()


def test_shuffled_labels_of_classes_keep_the_number_of_each(named_images, seeded):
    omniglot = Omniglot(named_images, torch.arange(30) % 3, way=3, shot=2, query_shots=4)
    spoilt = Corrupted(omniglot, kind="shuffled_labels", fraction=1.0)
    x, y = spoilt.sample(200, generator=seeded(4))["query"]
    assert all(task.bincount(minlength=3).tolist() == [4, 4, 4] for task in y)
    characters = (x[:, :, 0, 0, 0] * 255).round()
    pairs = [
        len(set(zip(drawn.tolist(), targets.tolist(), strict=True)))
        for drawn, targets in zip(characters, y, strict=True)
    ]
    assert min(pairs) >= 3 and sum(pairs) > 6 * len(pairs)  # a clean task has 3 pairs


@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_label_noise_is_gaussian_and_independent_from_example_to_example(scale, seeded):
    spoilt = Corrupted(SINE, kind="label_noise", fraction=1.0, scale=scale)
    tasks, clean = spoilt.sample(MANY, generator=seeded(8)), clean_tasks(seeded, 8)
    noise = []
    for part, (x, y) in tasks.items():
        assert torch.equal(x, clean[part][0])
        noise.append((y - clean[part][1]).double().squeeze(2) / scale)
    noise = torch.cat(noise, 1)  # [tasks, examples of both sets]
    moments = [noise.pow(power).mean().item() for power in (1, 2, 3, 4)]
    variances = [1, 2, 15, 96]  # of the powers of a standard normal number
    for found, expected, variance in zip(moments, [0, 1, 0, 3], variances, strict=True):
        assert abs(found - expected) < 5 * math.sqrt(variance / noise.numel())
    correlation = noise.T @ noise / MANY - torch.eye(noise.shape[1]).double()
    assert correlation.abs().max() < 5 * math.sqrt(2 / MANY)


def test_noise_on_classes_is_refused(named_images, seeded):
    omniglot = Omniglot(named_images, torch.arange(30) % 3)
    spoilt = Corrupted(omniglot, kind="label_noise", fraction=0.5, scale=1.0)
    with pytest.raises(ValueError, match=r"targets that are numbers .*, found torch\.int64: take"):
        spoilt.sample(3, generator=seeded(0))
    spoilt.sample(3, split="test", generator=seeded(0))


@pytest.mark.parametrize("scale", [10.0, -0.5])
def test_the_outlier_scale_is_a_factor_of_the_targets(scale, seeded):
    tasks = Corrupted(SINE, kind="outlier_scale", fraction=1.0, scale=scale).sample(
        20, generator=seeded(5)
    )
    clean = clean_tasks(seeded, 5, 20)
    for part, (x, y) in tasks.items():
        assert torch.equal(x, clean[part][0])
        assert y.flatten().tolist() == pytest.approx(
            [scale * target for target in clean[part][1].flatten().tolist()]
        )


def test_the_outlier_scale_is_a_factor_of_drawings_whose_targets_are_classes(named_images, seeded):
    omniglot = Omniglot(named_images, torch.arange(30) % 3)
    spoilt = Corrupted(omniglot, kind="outlier_scale", fraction=1.0, scale=3.0)
    x, y = spoilt.sample(5, generator=seeded(6))["support"]
    clean_x, clean_y = omniglot.sample(5, generator=seeded(6))["support"]
    torch.testing.assert_close(x, clean_x + clean_x + clean_x)
    assert torch.equal(y, clean_y)


def test_foreign_tasks_are_straight_lines_among_sines(seeded):
    lines = Lines(slope=(2.0, 3.0), intercept=(5.0, 6.0), inputs=SINE)
    spoilt = Corrupted(SINE, kind="foreign", fraction=0.4, foreign=lines)
    tasks = spoilt.sample(500, generator=seeded(7))
    spoilt_support, _ = spoilt_rows(tasks, clean_tasks(seeded, 7, 500))
    x, y = (torch.cat([a, b], 1) for a, b in zip(*tasks.values(), strict=True))
    assert 100 < spoilt_support.sum() < 300
    for task in range(500):
        matrix = torch.cat([x[task], torch.ones_like(x[task])], 1).double()
        solution = torch.linalg.lstsq(matrix, y[task].double()).solution.flatten()
        straight = (matrix @ solution - y[task, :, 0]).abs().max() < 1e-4
        assert straight == spoilt_support[task]
        if straight:
            assert 2 <= solution[0] <= 3 and 5 <= solution[1] <= 6


@given(seed=st.integers(0, 2**32))
def test_lines_have_the_inputs_of_their_sine_distribution(seed, seeded):
    sine = Sine(support="shuffled_grid", support_shots=5, query="grid", query_shots=3)
    tasks, inputs = (d.sample(4, generator=seeded(seed)) for d in (Lines(inputs=sine), sine))
    for part in ("support", "query"):
        assert torch.equal(tasks[part][0], inputs[part][0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "outlier_scale", "fraction": 0.0}, "fraction to be above 0 .*, found 0.0"),
        ({"kind": "outlier_scale", "fraction": 1.5}, "fraction to be above 0 .*, found 1.5"),
        ({"kind": "outlier_scale", "fraction": math.nan}, "fraction to be above 0 .*, found nan"),
        ({"kind": "outlier_scale", "fraction": 0.5, "scale": math.inf}, "scale to be finite"),
        ({"kind": "label_noise", "fraction": 0.5, "scale": 0.0}, "deviation, .* above 0, found 0"),
        ({"kind": "label_noise", "fraction": 0.5, "scale": -1.0}, "deviation, .*, found -1.0"),
        ({"kind": "foreign", "fraction": 0.5}, "kind='foreign' .* found None for 'foreign'"),
        (
            {"kind": "shuffled_labels", "fraction": 0.5, "foreign": SINE},
            r"None for the others, found Sine\(.*\) for 'shuffled_labels'",
        ),
        ({"kind": "noise", "fraction": 0.5}, "expected kind to be one of .* found 'noise'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_options_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Corrupted(SINE, **options)


@pytest.mark.parametrize("interval", ["slope", "intercept"])
def test_an_interval_of_lines_that_is_none_is_named(interval):
    with pytest.raises(ValueError, match=rf"expected {interval} to be \(low, high\)"):
        Lines(**{interval: (1.0, 0.0)})


@pytest.mark.parametrize(
    "foreign",
    [
        Lines(inputs=Sine(support_shots=7, query_shots=4)),
        Lines(inputs=Sine(support_shots=6, query_shots=5)),
        Lines(inputs=Sine(support_shots=6, query_shots=4, dtype=torch.float64)),
    ],
)
def test_foreign_tasks_of_another_form_are_named(foreign, seeded):
    spoilt = Corrupted(SINE, kind="foreign", fraction=0.5, foreign=foreign)
    with pytest.raises(ValueError, match=r"expected foreign tasks with (support|query) tensors"):
        spoilt.sample(3, generator=seeded(0))
