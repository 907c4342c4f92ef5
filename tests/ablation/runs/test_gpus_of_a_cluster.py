"""A real Ray cluster that is told it has two GPUs: each group of runs gets one of its own.

No GPU is needed, because nothing is trained: a group answers which GPUs it may see.
"""

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gradagree_testing.forked import Program

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("ray_settings")
def test_a_group_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    program = Program(Path(__file__), output=tmp_path / "said", environment=os.environ)
    assert not program.finish(), program.printed()


def seen(*_: object) -> tuple[str, float, float]:
    """Which GPUs this process may see, and from when to when it held them."""
    start = time.time()
    time.sleep(0.5)
    return os.environ["CUDA_VISIBLE_DEVICES"], start, time.time()


def main() -> None:
    """Four groups on two GPUs."""
    import ray

    from gradagree_opt.ablation.runs import cluster
    from gradagree_opt.ablation.runs.job import Job, Task
    from gradagree_opt.ablation.study.loading import load

    cluster.perform_there = seen  # type: ignore[assignment] # in place of training
    ray.init("local", num_cpus=3, num_gpus=2, include_dashboard=False, log_to_driver=False)
    with cluster.Cluster() as found:
        device = found.choose_device("auto")
        assert device == found.choose_device("cuda") == torch.device("cuda", 0)
        assert found.choose_device("cpu") == torch.device("cpu")
        assert found.slots(device) == 2
        job = Job(load("sine"), None, None, compiled=False, device=device)
        with found.workers(job, print) as workers:
            futures = [workers.submit(Task([])) for _ in range(4)]
            groups = [future.result(120) for future in futures]
    by_gpu = {gpu: [group for group in groups if group[0] == gpu] for gpu in ("0", "1")}
    assert sum(map(len, by_gpu.values())) == 4, groups
    for held in by_gpu.values():
        ordered = sorted(held, key=lambda group: group[1])
        assert all(one[2] <= other[1] for one, other in pairwise(ordered)), groups
    ray.shutdown()


if __name__ == "__main__":
    main()
