"""Several ranks beside one process, in processes and over a process group that are real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(name: str, world: int, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """One program on so many ranks; what each of them answered."""
    program = Path(__file__).with_name("programs.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, str(program), name, str(rank), str(world), str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    answers = []
    for process in started:
        out, error = process.communicate(timeout=300)
        answers.append(subprocess.CompletedProcess(name, process.returncode, out, error))
    return answers


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("aggregations", 1),
        ("aggregations", 3),
        ("gramian_in_blocks", 2),
        ("messages", 2),
        ("draws", 2),
        ("loops", 2),
        ("wrapped", 2),
        ("functional_through_the_wrapper", 2),
        ("copies", 2),
        ("replicas", 3),
        ("failures", 2),
        ("cancelling", 2),
        ("unlike", 2),
        ("own_draws", 2),
        ("a_rank_that_runs_out_of_tasks", 2),
        ("refusals", 2),
    ],
)
def test_ranks_do_what_one_process_does(name: str, world: int, tmp_path: Path) -> None:
    answers = run(name, world, tmp_path)
    failed = [answer.stderr[-3000:] for answer in answers if answer.returncode]
    assert not failed, "\n".join(failed)


def test_a_rank_that_dies_is_told_to_the_others(tmp_path: Path) -> None:
    first, last = run("killed", 2, tmp_path)
    assert last.returncode == 9
    assert first.returncode == 0, first.stderr[-3000:]
