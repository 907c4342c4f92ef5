"""The rows of grouped data: read from a data frame, checked, and standardised."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradagree_opt.annotations import Float, Int
from gradagree_opt.tasks.protocol import SPLITS, check_split_numbers


class Scale(NamedTuple):
    """Mean and standard deviation over the rows of the training groups."""

    mean: Float[Tensor, " columns"]
    deviation: Float[Tensor, " columns"]


class GroupedRows(NamedTuple):
    """The numbers of a data frame, and the groups in the order of their names."""

    x: Float[Tensor, "rows features"]
    y: Float[Tensor, " rows"]
    groups: Int[Tensor, " rows"]
    names: list[Hashable]


def read_frame(frame: Any, /, *, inputs: Sequence[str], target: str, group: str) -> GroupedRows:
    """The rows of a data frame, or in one sentence why they cannot be learned from.

    Raises:
        TypeError: it is no data frame, ``inputs`` is one name, or a column holds no numbers.
        ValueError: a column is missing, or a row has no number or no group.
    """
    if not hasattr(frame, "columns"):
        raise TypeError(
            f"expected a pandas DataFrame, found {frame!r:.80}; read a file by pandas.read_csv"
        )
    if isinstance(inputs, str):
        raise TypeError(
            f"expected inputs to be a list of columns, found {inputs!r}; write [{inputs!r}]"
        )
    for column in (*inputs, target, group):
        if column not in frame.columns:
            raise ValueError(
                f"expected a column {column!r}, found {', '.join(map(repr, frame.columns))}"
            )
    for column in (*inputs, target):
        if frame[column].dtype.kind not in "biuf":
            raise TypeError(
                f"expected numbers in the column {column!r}, found {frame[column].dtype}: "
                "make numbers of it by pandas.to_numeric or pandas.get_dummies, or leave it out"
            )
    numbers = frame[[*inputs, target]].to_numpy(dtype="float64", na_value=float("nan"))
    values = torch.tensor(numbers)
    bad = ~values.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"expected finite numbers in {', '.join(map(repr, (*inputs, target)))}, "
            f"found NaN or infinity in {int(bad.sum())} of {len(bad)} rows, the first in row "
            f"{frame.index[int(bad.int().argmax())]}: leave them out, as by frame.dropna()"
        )
    if frame[group].isna().any():
        raise ValueError(
            f"expected a group in every row, found none in {int(frame[group].isna().sum())} of "
            f"{len(frame)} rows of {group!r}: leave them out, as by frame.dropna()"
        )
    members = list(frame[group])
    names = sorted(set(members))
    numbered = {name: number for number, name in enumerate(names)}
    groups = torch.tensor([numbered[name] for name in members], dtype=torch.int64)
    return GroupedRows(values[:, :-1], values[:, -1], groups, names)


def standardised(values: Tensor, training: Tensor, /) -> tuple[Tensor, Scale]:
    """The columns in standard deviations from the mean, both over the training rows alone."""
    values = values.double()
    seen = values[training]
    scale = Scale(seen.mean(0), seen.std(0, correction=0))
    # equal values too: their mean may be rounded away from them
    if ((scale.deviation == 0) | (seen.amin(0) == seen.amax(0))).any():
        raise ValueError("expected columns that vary in the training groups, found a constant one")
    return (values - scale.mean) / scale.deviation, scale


def check_rows(x: Tensor, y: Tensor, groups: Tensor, splits: Tensor, /) -> None:
    """Say in one sentence why these are not rows in groups with their splits."""
    if x.dim() != 2 or y.shape != x.shape[:1] or groups.shape != x.shape[:1]:
        raise ValueError(
            "expected x of shape [rows, features] and y and groups of shape [rows], "
            f"found {list(x.shape)}, {list(y.shape)} and {list(groups.shape)}"
        )
    for name, numbers in (("groups", groups), ("splits", splits)):
        if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
            raise TypeError(f"expected {name} to be integers, found {numbers.dtype}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("expected finite inputs and targets, found NaN or infinity")
    if splits.dim() != 1 or not ((groups >= 0) & (groups < len(splits))).all():
        raise ValueError(
            f"expected a split number for each of the groups 0 … {int(groups.max())}, "
            f"found shape {list(splits.shape)}"
        )
    check_split_numbers(splits)
    if not (splits == SPLITS.index("train"))[groups.long()].any():
        raise ValueError("expected rows of training groups to standardise by, found none")
