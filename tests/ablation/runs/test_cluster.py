"""Studies over a real Ray cluster of this machine: the same bits, killed workers, unlike nodes."""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest

from gradagree_opt.ablation import ablate
from gradagree_opt.ablation.runs.job import Task
from gradagree_opt.ablation.runs.sweep import Sweep, tuning_runs
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.devices import CPU
from gradagree_testing.command import gradagree

from ..conftest import WriteStudy

if TYPE_CHECKING:
    from gradagree_opt.ablation.runs.cluster import Cluster

slow = pytest.mark.slow
OWN = """\
import os
import signal
from pathlib import Path

FIRST = Path("killed")

class Own:
    needs = frozenset({"squared_norms"})

    def __init__(self, killed_at: int = 0):
        self.killed_at, self.calls = killed_at, 0

    def __call__(self, statistics, /):
        self.calls += 1
        if self.calls == self.killed_at and not FIRST.exists():
            FIRST.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        lengths = statistics.squared_norms.sqrt()
        return lengths / lengths.sum(-1, keepdim=True)
"""
"""A weighting that kills the process in which it is called so many times, once."""


@pytest.fixture(scope="module")
def cluster(ray_settings: None) -> Iterator["Cluster"]:
    """One of two cores, that a program is connected to already."""
    ray = pytest.importorskip("ray")
    from gradagree_opt.ablation.runs.cluster import Cluster

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with Cluster() as connected:
            yield connected
        assert ray.is_initialized()  # by another: not to be ended here
    finally:
        ray.shutdown()


@pytest.fixture
def submitted(cluster: "Cluster", monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """What is given to the cluster."""
    from gradagree_opt.ablation.runs.cluster import Nodes

    tasks: list[Task] = []
    submit = Nodes.submit

    def spy(self: Nodes, task: Task, /) -> Any:
        tasks.append(task)
        return submit(self, task)

    monkeypatch.setattr(Nodes, "submit", spy)
    return tasks


@pytest.fixture
def study_of_ones_own(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Writes a study of the mean and a weighting of one's own, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_here.py").write_text(OWN)

    def write(killed_at: int = 0, **changes: object) -> Path:
        own = {"name": "own", "aggregator": "own_here:Own", "options": {"killed_at": killed_at}}
        methods = [{"name": "mean", "aggregator": "mean"}, own]
        return write_study(methods=methods, compile=False, **changes)

    yield write
    sys.modules.pop("own_here", None)
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]


def ignore(_: object) -> None:
    pass


def on(cluster: "Cluster | None", study: Study, out: Path, seconds: float = 300.0) -> Sweep:
    return Sweep(study, out, None, pytest.fail, CPU, seconds, cluster)


def labels(task: Task) -> tuple[object, ...]:
    return tuple(run.label for run in task.runs)


def assert_same_runs(out: Path, expected: Path) -> None:
    """The same records, apart from the seconds, and the same bytes of parameters."""
    from gradagree_opt.ablation.training.run import RunRecord

    names = sorted(path.name for path in expected.glob("runs/*"))
    assert sorted(path.name for path in out.glob("runs/*")) == names
    for name in names:
        found, other = ((folder / "runs" / name).read_bytes() for folder in (out, expected))
        if name.endswith(".json"):
            records = map(RunRecord.model_validate_json, (found, other))
            one, another = (record.model_dump(exclude={"seconds"}) for record in records)
            assert one == another
        else:
            assert found == other


@pytest.mark.long
@slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that kills")
@pytest.mark.parametrize("seconds", [300.0, 0.0], ids=["from its start", "from what was saved"])
def test_of_a_worker_that_is_killed_its_group_alone_is_trained_again_to_the_same_bits(
    cluster: "Cluster", submitted: list[Task], study_of_ones_own: Callable[..., Path],
    tmp_path: Path, seconds: float,
) -> None:  # fmt: skip
    study = load(str(study_of_ones_own(killed_at=130, iterations=160))).with_code()
    runs, steps = tuning_runs(study), list[int]()
    on(cluster, study, tmp_path / "cluster", seconds).complete(runs, 2, steps.append)
    assert (tmp_path / "killed").exists()
    names = [task.runs[0].method.name for task in submitted]
    assert names == ["mean", "own", "own"]
    assert [task.saved is not None for task in submitted] == [False, False, seconds == 0]
    assert labels(submitted[1]) == labels(submitted[2])
    on(None, study, tmp_path / "here").complete(runs, 1, ignore)
    assert_same_runs(tmp_path / "cluster", tmp_path / "here")
    lost = sum(steps) - study.iterations * len(runs)
    assert 0 < lost <= 2 * 130


@slow
@pytest.mark.usefixtures("without_figures")
def test_from_python_with_modules_of_ones_own_in_the_current_folder(
    cluster: "Cluster", study_of_ones_own: Callable[..., Path], tmp_path: Path
) -> None:
    path = study_of_ones_own()
    found = ablate(path, out="out", engine="ray")
    expected = ablate(path, out="here", jobs=1)
    assert_same_runs(tmp_path / "out", tmp_path / "here")
    found_table, table = (each.table.drop(columns="median_seconds") for each in (found, expected))
    pd.testing.assert_frame_equal(found_table, table, check_exact=True)
    assert found.config.hardware == expected.config.hardware


@slow
def test_a_node_of_another_version_is_named_before_anything_is_written(
    cluster: "Cluster", study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch-2.5.1.dist-info").mkdir()
    metadata = tmp_path / "torch-2.5.1.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.1\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        result = gradagree("ablate", study_file, "--out", tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 2 and "\n" not in result.stderr.strip()
    assert "gradagree: the node " in result.stderr
    assert "expected torch 2.5.1 as where the study was started, found 2." in result.stderr
    assert not (tmp_path / "out").exists()


@slow
def test_a_node_with_other_data_or_modules_is_named(
    cluster: "Cluster", study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = on(cluster, study, tmp_path / "out")
    [run, *_] = tuning_runs(study)
    [node] = cluster.look(sweep.job(), run)
    assert node.hardware == on(None, study, tmp_path).nodes[0].hardware
    for changes, words in (
        ({"digest": "0" * 64}, "expected the data that the study began with, found others"),
        ({"study": study.model_copy(update={"code": {"own": "0"}})}, "expected the modules that"),
    ):
        with pytest.raises(StudyError, match=rf"^the node \S+ \(\S+\): {words}"):
            cluster.look(replace(sweep.job(), **changes), run)


@slow
def test_rooms_and_devices_are_those_of_the_cluster(cluster: "Cluster") -> None:
    from gradagree_opt.ablation.runs.cluster import Cluster

    assert cluster.slots(CPU) == 2 and Cluster(jobs=5).slots(CPU) == 5
    assert cluster.choose_device("auto") == cluster.choose_device("cpu") == CPU
    with pytest.raises(StudyError, match="expected a GPU in the Ray cluster for the device 'cuda'"):
        cluster.choose_device("cuda")
    with pytest.raises(StudyError, match=r"found 'cuda:1'; give cuda$"):
        cluster.choose_device("cuda:1")
    with pytest.raises(StudyError, match="expected Ray not to be initialized yet"), Cluster("auto"):
        pytest.fail("it has two clusters")
