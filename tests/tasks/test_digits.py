"""Pairs of digits, against plain Python on drawings that can be told apart in a picture."""

import sys

import pytest
import torch
from sklearn.datasets import load_digits

from gradagree_opt.tasks import DigitPairs
from gradagree_opt.tasks.digits import QUESTIONS, overlay, pairs

ANSWERS = [
    lambda upper, lower: upper,
    lambda upper, lower: lower,
    max,
    min,
    lambda upper, lower: abs(upper - lower),
    lambda upper, lower: (upper + lower) % 10,
]
N = 45
FIRST_OF_THE_TEST = [2, 5, 6, 15, 20]


@pytest.fixture(scope="module")
def made_up():
    """Drawing number i has the ink i + 1 everywhere, and is of the digit i modulo 10."""
    drawings = torch.arange(1.0, N + 1)[:, None, None].expand(N, 8, 8)
    splits = torch.arange(N) // 3 % 3
    return DigitPairs(drawings, torch.arange(N) % 10, splits, support_shots=30, query_shots=20)


def drawings_in(x):
    """The numbers of the upper and the lower drawing of every picture."""
    return [(x[..., 0, corner, corner] - 1).long() for corner in (0, 11)]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("seed", range(3))
def test_every_task_asks_its_question_of_two_drawings_of_the_split(made_up, seeded, seed, split):
    tasks = made_up.sample(14, split=split, generator=seeded(seed))
    own = {i for i in range(N) if i // 3 % 3 == ["train", "validation", "test"].index(split)}
    for x, y in tasks.values():
        upper, lower = drawings_in(x)
        assert set(upper.flatten().tolist()) | set(lower.flatten().tolist()) == own
        assert (upper != lower).all()
        for task in range(14):
            for above, below, found in zip(upper[task], lower[task], y[task], strict=True):
                assert found == ANSWERS[task % 6](int(above) % 10, int(below) % 10)


def test_each_six_tasks_have_the_same_pictures_and_the_next_six_others(made_up, seeded):
    tasks = made_up.sample(14, generator=seeded(0))
    (support, _), (query, _) = tasks["support"], tasks["query"]
    assert support.shape == (14, 30, 1, 12, 12) and query.shape == (14, 20, 1, 12, 12)
    for x in (support, query):
        assert all(torch.equal(x[task], x[task // 6 * 6]) for task in range(14))
        assert not torch.equal(x[0], x[6]) and not torch.equal(x[6], x[12])
    assert not torch.equal(support[0, :20], query[0])


def test_the_lists_of_questions_are_as_long(made_up):
    assert len(QUESTIONS) == len(ANSWERS) == 6


def test_every_ordered_pair_of_different_numbers_comes_equally_often(seeded):
    draws = 12_000
    first, second = pairs(4, (draws,), seeded(5))
    counts = (first * 4 + second).bincount(minlength=16).view(4, 4)
    expected = torch.full((4, 4), draws / 12).fill_diagonal_(0)
    assert counts.diagonal().eq(0).all()
    assert (counts - expected).abs().max() < 5 * (draws / 12) ** 0.5


def test_a_picture_is_the_darker_of_both_drawings_pixel_by_pixel(seeded):
    upper, lower = (torch.rand(8, 8, generator=seeded(seed)) for seed in (0, 1))
    picture = overlay(upper, lower)
    for row in range(12):
        for column in range(12):
            ink = [0.0]
            if row < 8 and column < 8:
                ink.append(upper[row, column].item())
            if row >= 4 and column >= 4:
                ink.append(lower[row - 4, column - 4].item())
            assert picture[row, column] == max(ink)


def test_the_data_are_those_of_scikit_learn_and_each_drawing_is_in_one_split():
    ours, theirs = DigitPairs.from_scikit_learn(), load_digits()
    assert (ours.drawings * 16 == torch.from_numpy(theirs.images)).all()
    assert ours.digits.tolist() == theirs.target.tolist()
    assert [len(rows) for rows in ours.rows.values()] == [1079, 359, 359]
    assert sorted(torch.cat(list(ours.rows.values())).tolist()) == list(range(1797))
    assert len(torch.unique(ours.drawings.flatten(1), dim=0)) == 1797  # no drawing is there twice
    for rows in ours.rows.values():
        shares = ours.digits[rows].bincount(minlength=10) / len(rows)
        assert ((shares > 0.07) & (shares < 0.13)).all()


def test_the_split_is_pinned_and_the_same_for_any_shots():
    few, many = (DigitPairs.from_scikit_learn(support_shots=shots) for shots in (1, 64))
    assert few.rows["test"].tolist() == many.rows["test"].tolist()
    assert few.rows["test"][:5].tolist() == FIRST_OF_THE_TEST


def test_without_scikit_learn_one_sentence_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'install it with: pip install "scikit-learn>=1\.4\.2"$'):
        DigitPairs.from_scikit_learn()


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"drawings": torch.zeros(9, 8, 7)}, ValueError, r"drawings of shape .* found \[9, 8, 7\]"),
        ({"digits": torch.zeros(8, dtype=torch.int64)}, ValueError, r"found .*, \[8\] and \[9\]"),
        ({"digits": torch.zeros(9)}, TypeError, "digits to be integers, found torch.float32"),
        ({"digits": torch.full((9,), 10)}, ValueError, "digits of 0 … 9, found 10"),
        ({"splits": torch.arange(9) % 3 - 1}, ValueError, "splits of 0 … 2, found -1"),
        ({"splits": torch.arange(9) % 2}, ValueError, "in each split, found 0 in 'test'"),
        ({"support_shots": 0}, ValueError, "support_shots to be at least 1, found 0"),
        ({"query_shots": 0}, ValueError, "query_shots to be at least 1, found 0"),
        ({"dtype": torch.int64}, TypeError, "a floating dtype, found torch.int64"),
    ],
)
def test_bad_drawings_and_options_are_named(changes, error, sentence):
    valid = {
        "drawings": torch.zeros(9, 8, 8),
        "digits": torch.arange(9),
        "splits": torch.arange(9) % 3,
    }
    options = {name: changes[name] for name in changes.keys() - valid.keys()}
    with pytest.raises(error, match=sentence):
        DigitPairs(*(changes.get(name, value) for name, value in valid.items()), **options)
