"""Several ranks beside one process, in processes and over a process group that are real."""

import importlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gradagree_testing.forked import Program

pytestmark = pytest.mark.slow


def run(name: str, world: int, folder: Path, file: str, store: str = "store") -> list[Program]:
    """One program on so many ranks, which have ended."""
    ranks = [
        Program(
            Path(__file__).with_name(file),
            *(name, str(rank), str(world), str(folder / store)),
            output=folder / f"said-{rank}",
            environment=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(world)
    ]
    for rank in ranks:
        rank.finish()
    return ranks


def check(ranks: list[Program]) -> None:
    failed = [rank.printed() for rank in ranks if rank.finish()]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("about", "name", "world"),
    [
        ("aggregation", "aggregations", 1),
        ("aggregation", "aggregations", 3),
        ("aggregation", "aggregations", 4),
        ("aggregation", "gramian_in_blocks", 2),
        ("aggregation", "draws", 2),
        ("aggregation", "own_draws", 2),
        ("aggregation", "cancelling", 2),
        ("aggregation", "graphs", 2),
        ("aggregation", "half_precision", 2),
        ("message", "messages", 2),
        ("message", "messages_of_the_first_rank", 3),
        ("loop", "a_rank_that_runs_out_of_tasks", 2),
        ("loop", "loops", 2),
        ("loop", "replicas", 3),
        ("loop", "dropped_tasks", 2),
        ("loop", "adapting_in_bfloat16", 2),
        ("failure", "unlike", 2),
        ("failure", "unlike_steps", 2),
        ("failure", "unlike_steps", 3),
        ("failure", "own_decisions", 3),
        ("failure", "failures", 2),
        ("failure", "left_alone", 2),
        ("failure", "refusals", 2),
    ],
)
def test_ranks_do_what_one_process_does(about: str, name: str, world: int, tmp_path: Path) -> None:
    check(run(name, world, tmp_path, f"{about}_programs.py"))


@pytest.mark.parametrize("name", ["wrapped", "functional_through_the_wrapper", "copies"])
def test_wrapped_modules_and_copies_do_what_one_process_does(name: str, tmp_path: Path) -> None:
    check(run(name, 2, tmp_path, "wrapped_programs.py"))


@pytest.mark.parametrize("world", [2, 4])
def test_a_mean_over_ranks_is_that_of_distributed_data_parallel_to_the_bit(
    world: int, tmp_path: Path
) -> None:
    check(run("plain_mean", world, tmp_path, "wrapped_programs.py"))


def test_weightings_of_torchjd_do_what_they_do_in_one_process(tmp_path: Path) -> None:
    pytest.importorskip("torchjd", reason="TorchJD is not installed")
    check(run("weightings_of_torchjd", 2, tmp_path, "framework_programs.py"))


def test_models_of_accelerate_do_what_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    check(run("models_of_accelerate", 2, tmp_path, "framework_programs.py"))


def test_learners_of_learn2learn_do_what_a_loop_in_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("learn2learn", reason="learn2learn is not installed")
    check(run("learners_of_learn2learn", 2, tmp_path, "framework_programs.py"))


def test_learners_of_higher_do_what_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("higher", reason="higher is not installed")
    check(run("learners_of_higher", 2, tmp_path, "framework_programs.py"))


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("unlike_processors", 2),
        ("numbers_of_threads", 2),
        ("odd_models", 3),
        ("some_ranks", 3),
        ("one_rank_fails", 2),
        ("one_task_and_forty", 2),
    ],
)
def test_ranks_that_are_unlike_do_what_one_process_does(
    name: str, world: int, tmp_path: Path
) -> None:
    check(run(name, world, tmp_path, "odd_programs.py"))


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("fsdp", 2),
        ("fsdp", 3),
        ("data_by_shards", 2),
        ("tasks_by_shards", 4),
        ("another_process_group", 4),
        ("replicated", 4),
        ("half_precision", 2),
    ],
)
def test_sharded_parameters_do_what_one_process_does(name: str, world: int, tmp_path: Path) -> None:
    if not hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("before PyTorch 2.6 FSDP2 runs on GPUs alone")
    check(run(name, world, tmp_path, "sharded_programs.py"))


@pytest.mark.parametrize(
    "name", ["lightning", "a_task_for_each_device", "lightning_manual", "fabric"]
)
def test_lightning_on_two_devices_does_what_one_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    check(run(name, 2, tmp_path, "lightning_programs.py", f"store-{port}"))


@pytest.mark.parametrize(
    ("name", "world", "gone"),
    [
        ("killed", 3, 2),
        ("killed_in_a_group_of_no_named_backend", 4, 3),
        ("killed_with_its_store", 3, 0),
        ("hanging", 3, 2),
    ],
)
def test_a_rank_that_is_lost_is_named_by_all_others(
    name: str, world: int, gone: int, tmp_path: Path
) -> None:
    ranks = run(name, world, tmp_path, "lost_programs.py")
    lost = ranks.pop(gone)
    assert lost.finish() == (0 if name == "hanging" else 9), lost.printed()
    check(ranks)


def test_a_rank_that_fails_where_others_wait_is_named_by_all_of_them(tmp_path: Path) -> None:
    check(run("failing", 3, tmp_path, "lost_programs.py"))


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_sends_two_vectors_over_the_network(world: int, tmp_path: Path) -> None:
    namespace = ["unshare", "--net", "--map-root-user", "sh", "-c"]
    up = "ip link set lo up"
    if shutil.which("unshare") is None or subprocess.run([*namespace, up], check=False).returncode:
        pytest.skip("no network namespace of one's own here")
    program = Path(__file__).with_name("message_programs.py")
    ranks = " ".join(map(str, range(world)))
    script = (
        f"{up}; started=; for rank in {ranks}; do "
        f"'{sys.executable}' '{program}' bytes_on_loopback $rank {world} '{tmp_path}/store' & "
        'started="$started $!"; done; for one in $started; do wait $one || exit 1; done'
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    answer = subprocess.run(
        [*namespace, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
