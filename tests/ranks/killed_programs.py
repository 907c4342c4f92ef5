"""The script of docs/scaling.md, one rank of which is killed at a moment: MOMENT SCRIPT ARGUMENTS.

Each moment is a call, by its number, that the rank begins and does not come to make.
"""

import os
import runpy
import shutil
import signal
import sys
from typing import Any

from torch.distributed.checkpoint import filesystem

import gradagree_opt as ga

MOMENTS: dict[str, tuple[Any, str, int, int]] = {
    "between two checkpoints": (ga.Reptile, "step", 1, 31),
    "before its part is written": (filesystem.FileSystemWriter, "write_data", 1, 1),
    "before the metadata have their name": (filesystem.FileSystem, "rename", 0, 1),
    "before it removes an old one": (shutil, "rmtree", 0, 1),
}


def die_at(owner: Any, name: str, rank: int, number: int) -> None:
    call, left = getattr(owner, name), [number]

    def counted(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)

    if os.environ["RANK"] == str(rank):
        setattr(owner, name, counted)


if __name__ == "__main__":
    moment, script = sys.argv[1:3]
    die_at(*MOMENTS[moment])
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")
