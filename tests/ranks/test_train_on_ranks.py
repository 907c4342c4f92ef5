"""The script of docs/scaling.md under torchrun: trained, killed, and gone on with.

Where torchrun itself is not what is looked at, its ranks are started here, with its variables.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gradagree_testing.forked import Program

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "train_on_ranks.py"
STEPS = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # read by one process
]


def start(folder: Path, steps: int = STEPS) -> subprocess.Popen[str]:
    """Two ranks, by torchrun."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *command, str(SCRIPT), str(folder), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


def finish_ranks(world: int, folder: Path, steps: int = STEPS, *drawings: Path) -> None:
    """So many ranks, without torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        Program(
            SCRIPT,
            *map(str, (folder, steps, *drawings)),
            output=folder.parent / f"said-{rank}",
            environment=settings | group | {"RANK": str(rank)},
        )
        for rank in range(world)
    ]
    for rank in ranks:
        assert rank.finish() == 0, rank.printed()


def parameters(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """What a checkpoint holds."""
    path = folder / f"step-{step:06d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that two ranks have trained into without a stop."""
    folder: Path = tmp_path_factory.mktemp("whole")
    finish(start(folder))
    return folder


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # one that has ended meanwhile
            parent = file.read_text().rpartition(")")[2].split()[1]
            found += [int(file.parent.name)] * (int(parent) == pid)
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks were killed after their first checkpoint, and had begun a second one by then."""
    folder: Path = tmp_path_factory.mktemp("killed")
    process = start(folder, steps=100_000)
    while not list(folder.glob("step-*/.metadata")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    for pid in (*children(process.pid), process.pid):  # torchrun's ranks are no group of its own
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    for path in folder.glob("step-*"):
        if int(path.name.removeprefix("step-")) >= STEPS:  # as if it had been killed before
            (path / ".metadata").unlink(missing_ok=True)
    assert list(folder.glob("step-*/.metadata"))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 3])
def test_it_goes_on_after_a_kill_with_as_many_ranks_and_with_more(
    world: int, whole: Path, killed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "out"))
    if world == 2:
        finish(start(folder))
    else:
        finish_ranks(world, folder)
    expected = parameters(whole)
    found = parameters(folder)
    assert found["step"] == STEPS
    for name, tensor in expected.items():
        if world == 2:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_two_checkpoints_are_kept_and_they_hold_tensors_only(whole: Path) -> None:
    assert [path.name for path in sorted(whole.iterdir())] == ["step-000040", "step-000060"]
    assert all(isinstance(leaf, Tensor) for leaf in parameters(whole).values())


def test_drawings_too_are_trained_on_any_number_of_ranks(tmp_path: Path) -> None:
    drawings = tmp_path / "omniglot.npz"
    images = np.random.default_rng(0).integers(0, 256, (18, 20, 28, 28), dtype=np.uint8)
    np.savez(drawings, images=images, vinyals_split=np.repeat([0, 1, 2], 6))
    for world, steps in ((1, 4), (2, 2), (3, 4)):  # three go on from two steps of two
        folder = tmp_path / ("alone" if world == 1 else "ranks")
        finish_ranks(world, folder, steps, drawings)
    expected, found = (parameters(tmp_path / name, 4) for name in ("alone", "ranks"))
    assert expected["step"] == found["step"] == 4
    for name, tensor in expected.items():
        assert tensor.any(), name
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_page_names_the_script() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    assert re.search(r"torchrun [^`]*docs/train_on_ranks\.py", page)
