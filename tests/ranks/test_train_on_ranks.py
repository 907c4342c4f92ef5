"""The script of docs/scaling.md under torchrun: trained, killed, and gone on with.

Where torchrun itself is not what is looked at, its ranks are started here, with its variables.
"""

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import mse_loss

import gradagree_opt as ga
from gradagree_opt.tasks import Sine
from gradagree_testing.forked import Program

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "loops" / "ranks_after.py"
BEFORE = ROOT / "docs" / "loops" / "ranks_before.py"
KILLED = Path(__file__).with_name("killed_programs.py")
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


def start_ranks(world: int, folder: Path, file: Path, *arguments: object) -> list[Program]:
    """So many ranks, without torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        Program(
            file,
            *map(str, arguments),
            output=folder.parent / f"said-{rank}",
            environment=settings | group | {"RANK": str(rank)},
        )
        for rank in range(world)
    ]


def finish_ranks(world: int, folder: Path, steps: int = STEPS, *drawings: Path) -> None:
    for rank in start_ranks(world, folder, SCRIPT, folder, steps, *drawings):
        assert rank.finish() == 0, rank.printed()


def parameters(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """What a checkpoint holds."""
    path = folder / f"step-{step:06d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it loads in a single process
        dcp.load(state, checkpoint_id=path)
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
    check_same(parameters(folder), parameters(whole), world)


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], world: int) -> None:
    """Of two ranks and of so many."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if world == 2:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_it_goes_on_after_a_kill_at_any_moment(whole: Path, tmp_path: Path) -> None:
    """Killed again and again, each time at another one; then with fewer ranks, more and as many."""
    folder, expected = tmp_path / "killed", parameters(whole)
    for moment, dies, complete in (
        ("between two checkpoints", 1, {20: True}),
        ("before its part is written", 1, {20: True, 40: False}),
        ("before the metadata have their name", 0, {20: True, 40: False}),
        ("before it removes an old one", 0, {40: True, 60: True}),  # which the other may remove
    ):
        ranks = start_ranks(2, folder, KILLED, moment, SCRIPT, folder, STEPS)
        assert ranks[dies].finish() == -signal.SIGKILL, ranks[dies].printed()
        ranks[1 - dies].process.kill()
        ranks[1 - dies].finish()
        left = {int(path.name[5:]): (path / ".metadata").exists() for path in folder.iterdir()}
        assert left.items() >= complete.items() and len(left) - len(complete) <= (60 in left)
        if moment == "before the metadata have their name":
            for world in (1, 3):
                copy = Path(shutil.copytree(folder, tmp_path / str(world)))
                finish_ranks(world, copy)
                check_same(parameters(copy), expected, world)
    finish_ranks(2, folder)
    check_same(parameters(folder), expected, world=2)


def test_the_loop_of_one_process_trains_the_same_and_learns(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    alone = Program(
        BEFORE, str(folder), str(STEPS), output=tmp_path / "said", environment=os.environ
    )
    assert alone.finish() == 0, alone.printed()
    found = parameters(folder)
    check_same(found, parameters(whole), world=1)
    torch.manual_seed(0)
    model = runpy.run_path(str(BEFORE))["regression"]().double()
    start = {name: p.detach() for name, p in model.named_parameters()}
    sines = Sine(support_shots=10, query_shots=10, dtype=torch.float64)
    tasks = sines.sample(50, generator=torch.Generator().manual_seed(STEPS))

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(functional_call(model, params, (batch[0],)), batch[1])

    adapting = ga.MAML(loss_fn, ga.InnerSGD(lr=0.02, steps=5), first_order=True)
    before, after = (
        adapting.step({name: params[name] for name in start}, tasks, ga.Mean()).losses.mean()
        for params in (start, found)
    )
    assert after < 0.95 * before, (after, before)


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
    assert re.search(r"torchrun [^`]*docs/loops/ranks_after\.py", page)
