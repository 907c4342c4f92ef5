"""Programs in processes of their own, forked from one that has imported PyTorch for all of them."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from gradagree_opt.ablation.runs import processes

FORKS = multiprocessing.get_context("forkserver" if processes.FORKS else "spawn")
# The same process is forked for a study's workers. What is not installed is left out.
processes.IMPORTED += ["pytest", "torch.distributed.fsdp", "lightning.pytorch"]
FORKS.set_forkserver_preload(processes.IMPORTED)
PATIENCE = 300


class Program:
    """A script that runs as ``python FILE ARGUMENTS`` would, and what it has printed.

    Its modules are its own: gradagree_opt is without the checks of shapes that the tests have.

    Args:
        output: Where it prints: a file, or a terminal.
        environment: All of its variables.
    """

    def __init__(
        self, file: Path, *arguments: str, output: Path, environment: Mapping[str, str]
    ) -> None:
        self.output = output
        self.process: BaseProcess = FORKS.Process(
            target=execute, args=(file, arguments, output, dict(environment)), daemon=True
        )
        self.process.start()

    def finish(self) -> int:
        """Its exit status, negative for the signal that ended it."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"no end after {PATIENCE} seconds: {self.printed()}")
        return self.process.exitcode

    def printed(self) -> str:
        return self.output.read_text("utf-8")[-3000:]


def execute(file: Path, arguments: list[str], output: Path, variables: dict[str, str]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [str(file), *arguments]
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file), run_name="__main__")
