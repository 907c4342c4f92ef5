"""Splits of groups by their names, against properties and hashes taken by hand."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradagree_opt.tasks.group_splits import fold_groups, split_groups

TRAIN, VALIDATION, TEST = range(3)
names = st.lists(st.text(), min_size=3, max_size=40, unique=True)


def test_the_split_depends_on_names_alone_and_is_pinned():
    trees = [f"O1T{tree:02}" for tree in range(10)]
    splits = split_groups(trees)
    assert splits == [0, 1, 0, 2, 0, 0, 2, 0, 0, 1]
    assert split_groups(trees[::-1]) == splits[::-1]
    assert [split_groups(list(range(n))).count(2) for n in (3, 5, 7, 8, 11)] == [1, 1, 1, 2, 2]


@given(names=names, data=st.data())
def test_every_group_tests_once_validates_once_and_trains_in_all_other_folds(names, data):
    folds = data.draw(st.integers(3, len(names)))
    splits = [fold_groups(names, folds=folds, fold=fold) for fold in range(folds)]
    for roles in zip(*splits, strict=True):
        assert Counter(roles) == Counter({TRAIN: folds - 2, VALIDATION: 1, TEST: 1})
    sizes = [roles.count(TEST) for roles in splits]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
    for fold, roles in enumerate(splits):
        following = splits[(fold + 1) % folds]
        assert [role == VALIDATION for role in roles] == [role == TEST for role in following]


@given(names=names, data=st.data())
def test_the_fold_of_a_group_is_the_rank_of_its_hash_modulo_the_folds(names, data):
    folds = data.draw(st.integers(3, len(names)))
    shuffled = data.draw(st.permutations(names))
    hashes = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in names}
    for fold in range(folds):
        roles = fold_groups(shuffled, folds=folds, fold=fold)
        for name, role in zip(shuffled, roles, strict=True):
            rank = sum(other < hashes[name] for other in hashes.values())
            assert (role == TEST) == (rank % folds == fold)


@pytest.mark.parametrize(
    ("folds", "fold", "sentence"),
    [
        (2, 0, "expected folds to be 3 to 4, the number of groups, found 2"),
        (5, 0, "expected folds to be 3 to 4, the number of groups, found 5"),
        (4, 4, "expected fold to be 0 to 3, found 4"),
        (4, -1, "expected fold to be 0 to 3, found -1"),
    ],
)
def test_folds_that_cannot_be_dealt_are_named(folds, fold, sentence):
    with pytest.raises(ValueError, match=sentence):
        fold_groups(["a", "b", "c", "d"], folds=folds, fold=fold)
