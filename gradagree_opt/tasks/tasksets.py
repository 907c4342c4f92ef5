"""learn2learn's tasksets as a task distribution; public as ``adapters.learn2learn.Tasksets``."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradagree_opt.frameworks import require
from gradagree_opt.tasks.protocol import Batch, Split, check_sample_arguments

require("learn2learn")

from learn2learn.data import Taskset  # noqa: E402 - require says how to install it


class Tasksets:
    """learn2learn's tasksets as a :class:`gradagree_opt.tasks.TaskDistribution`.

    Its tasks come task-stacked, for ``meta.step``, ``plain.train`` and studies (kind learn2learn).
    All randomness of a task, in learn2learn's transforms and torchvision's too, follows from the
    generator, and the global generators are left as they were. A taskset of ``num_tasks`` has no
    others.

    Args:
        train, validation, test: tasksets of one task shape each; ``Tasksets(*tasksets)`` takes
            what ``learn2learn.vision.benchmarks.get_tasksets`` gives.
        shots: support examples of each class, the rest are query examples; None takes the examples
            at even positions for support and those at odd ones for query, as learn2learn's loops
            do.

    Raises:
        TypeError: one of them is no taskset.

    >>> from learn2learn.data import MetaDataset
    >>> from learn2learn.data.transforms import KShots, LoadData, NWays
    >>> x = torch.arange(30.0).unsqueeze(1)
    >>> data = MetaDataset(torch.utils.data.TensorDataset(x, torch.arange(30) // 6))
    >>> taskset = Taskset(data, [NWays(data, 3), KShots(data, 4), LoadData(data)])
    >>> tasks = Tasksets(taskset).sample(2, generator=torch.Generator().manual_seed(0))
    >>> [x.shape for x in tasks["support"]]
    [torch.Size([2, 6, 1]), torch.Size([2, 6])]
    """

    def __init__(
        self,
        train: Taskset,
        validation: Taskset | None = None,
        test: Taskset | None = None,
        /,
        *,
        shots: int | None = None,
    ) -> None:
        tasksets = {"train": train, "validation": validation, "test": test}
        self.tasksets = {name: taskset for name, taskset in tasksets.items() if taskset is not None}
        for name, taskset in self.tasksets.items():
            if not isinstance(taskset, Taskset):
                raise TypeError(
                    f"expected learn2learn.data.Taskset for {name}, found {type(taskset).__name__};"
                    " Tasksets(*tasksets) takes the three of a benchmark"
                )
        if shots is not None and shots < 1:
            raise ValueError(f"expected shots to be at least 1, found {shots}")
        self.shots = shots

    def sample(
        self, n_tasks: int, *, split: Split = "train", generator: torch.Generator
    ) -> dict[str, Batch]:
        """Draws tasks.

        Args:
            n_tasks: number of tasks.
            split: which of the tasksets.
            generator: a seeded generator, on any device.

        Returns:
            ``{"support": (x, y), "query": (x, y)}``, every tensor with the task axis first.

        Raises:
            TypeError, ValueError: as :meth:`gradagree_opt.tasks.Omniglot.sample`; or the tasks
                differ in shape, or a class has no more than ``shots`` examples.
        """
        check_sample_arguments(n_tasks, split, generator)
        if split not in self.tasksets:
            raise ValueError(
                f"expected one of the splits {sorted(self.tasksets)}, found {split!r}; "
                "give Tasksets its taskset"
            )
        taskset = self.tasksets[split]
        number = taskset.num_tasks if taskset.num_tasks > 0 else 2**31
        draws = torch.randint(number, (n_tasks,), generator=generator, device=generator.device)
        tasks = []
        for draw in draws.tolist():
            with seeded(draw):
                # taskset[draw] keeps descriptions, so that later calls would draw otherwise.
                tasks.append(self._halves(*taskset.get_task(taskset.sample_task_description())))
        stacked: dict[str, Batch] = tree_map(_stack, *tasks)
        return stacked

    def _halves(self, x: Tensor, y: Tensor) -> dict[str, Batch]:
        if self.shots is None:
            return {"support": (x[::2], y[::2]), "query": (x[1::2], y[1::2])}
        is_class = y.unsqueeze(1) == torch.unique(y)
        if (is_class.sum(0) <= self.shots).any():
            raise ValueError(
                f"expected more than {self.shots} examples of every class, found "
                f"{int(is_class.sum(0).min())}; give KShots the support and the query shots"
            )
        support = is_class.cumsum(0)[is_class] <= self.shots
        return {"support": (x[support], y[support]), "query": (x[~support], y[~support])}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's global generators seeded inside, as they were outside."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds all devices
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _stack(*leaves: Tensor) -> Tensor:
    if len({leaf.shape for leaf in leaves}) > 1:
        raise ValueError(
            f"expected tasks of one shape, found {[list(leaf.shape) for leaf in leaves][:3]}; give "
            "every task the same ways and shots"
        )
    return torch.stack(leaves)
