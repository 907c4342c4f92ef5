"""Which groups of a data set train, validate and test: one split for all, or folds in turn."""

import hashlib
from collections.abc import Hashable, Sequence

from gradagree_opt.tasks.protocol import SPLITS

HELD_OUT = 0.2
FEWEST_FOLDS = 3
"""One to test, one to validate, one to train."""


def split_groups(names: Sequence[Hashable], /) -> list[int]:
    """For each group the number of its split: a fifth to validate, a fifth to test, at least one.

    >>> split_groups(["a", "b", "c", "d", "e"])
    [2, 0, 0, 1, 0]
    """
    held_out = max(1, round(HELD_OUT * len(names)))
    order = shuffled_by_name(names)
    return numbered(len(names), validation=order[:held_out], test=order[-held_out:])


def fold_groups(names: Sequence[Hashable], /, *, folds: int, fold: int) -> list[int]:
    """For each group the number of its split where one fold tests and the next one validates.

    The groups are dealt into folds that differ by one group at most. Over all folds, every group is
    tested once and validates once.

    Args:
        names: of the groups, each of them once.
        folds: how many, at least 3.
        fold: the one that tests, 0 … folds - 1; fold + 1, or 0 after the last, validates.

    Raises:
        ValueError: there are fewer than 3 folds or fewer groups than folds, or ``fold`` is none of
            them.

    >>> [fold_groups(["a", "b", "c", "d", "e"], folds=3, fold=fold) for fold in range(3)]
    [[1, 0, 1, 2, 2], [2, 1, 2, 0, 0], [0, 2, 0, 1, 1]]
    """
    if not FEWEST_FOLDS <= folds <= len(names):
        raise ValueError(
            f"expected folds to be {FEWEST_FOLDS} to {len(names)}, the number of groups, "
            f"found {folds}"
        )
    if not 0 <= fold < folds:
        raise ValueError(f"expected fold to be 0 to {folds - 1}, found {fold}")
    order = shuffled_by_name(names)
    dealt = [order[number::folds] for number in range(folds)]
    return numbered(len(names), validation=dealt[(fold + 1) % folds], test=dealt[fold])


def shuffled_by_name(names: Sequence[Hashable], /) -> list[int]:
    """The places of the groups in the order of a hash of their names.

    The order of a data set often has a meaning: treatments stand one after another.
    """
    return sorted(
        range(len(names)), key=lambda place: hashlib.sha256(str(names[place]).encode()).digest()
    )


def numbered(count: int, /, *, validation: Sequence[int], test: Sequence[int]) -> list[int]:
    """For each place the number of the split that it is given to, training where it is to none."""
    splits = [SPLITS.index("train")] * count
    for place in validation:
        splits[place] = SPLITS.index("validation")
    for place in test:
        splits[place] = SPLITS.index("test")
    return splits
