"""Runs that were stopped in their midst, by force too, go on to the bit from what was saved."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

from gradagree_opt.ablation.runs.sweep import Sweep, tuning_runs
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.checkpoint import Checkpoint, Checkpoints
from gradagree_opt.ablation.training.problem import TrainingTasks, build_problem
from gradagree_opt.ablation.training.run import Run, RunRecord, Store
from gradagree_opt.ablation.training.training import Trained
from gradagree_testing.devices import each_device, train_group

from ..conftest import TINY

BLOCK, ITERATIONS = 25, 57  # a look after every second step
AT_0, AT_25, AT_50 = 3, 30, 54  # turns after which the last state is that of so many steps
CASES = {
    "equal agreement with momentum": ("equal_agreement", "momentum"),
    "random weights with Adam": ("random_weights", "adam"),
}


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingTasks, "BLOCK", BLOCK)


def longer(study: Study) -> Study:
    return study.model_copy(update={"iterations": ITERATIONS})


def runs_of(method: Method, *rates: float) -> list[Run]:
    seeds = (3, 5, 3)
    return [Run(method=method, rate=r, seed=seed) for r, seed in zip(rates, seeds, strict=False)]


def checkpoint_of(folder: Path, runs: list[Run], circumstances: str = "here") -> Checkpoint:
    return Checkpoint(folder, [str(run.label) for run in runs], circumstances, seconds=0.0)


def assert_same(found: Trained, expected: Trained) -> None:
    for (record, params), (other, others) in zip(found, expected, strict=True):
        assert as_text(record) == as_text(other)
        torch.testing.assert_close(params, others, rtol=0, atol=0, equal_nan=True)


def as_text(record: RunRecord) -> str:
    """What it found, in which NaN equals NaN."""
    return record.model_dump_json(exclude={"seconds"})


@each_device
@pytest.mark.parametrize("case", CASES)
def test_a_group_that_was_stopped_goes_on_to_the_bit(
    study: Study, tmp_path: Path, case: str, device: str
) -> None:
    study = longer(study)
    aggregator, optimizer = CASES[case]
    method = Method(name="method", aggregator=aggregator, outer=optimizer)
    runs = runs_of(method, 0.05, 0.01, 1e30)  # the last diverges
    problem = build_problem(study, None, torch.device(device))
    expected = train_group(study, problem, runs)
    assert expected[2][0].curve[-1].iteration < ITERATIONS
    for turns, done in ((AT_0, 0), (AT_25, 25), (AT_50, 50)):
        checkpoint = checkpoint_of(tmp_path, runs)
        train_group(study, problem, runs, checkpoint, turns)
        state = checkpoint.read()
        assert state is not None and state["program"]["done"] == done
        assert_same(train_group(study, problem, runs, checkpoint), expected)
        checkpoint.remove()


def test_flipped_tasks_go_on_too(study: Study, tmp_path: Path) -> None:
    from gradagree_opt.ablation.study.sections import CorruptionSection

    flipped = CorruptionSection(kind="flipped", fraction=0.4, scale=2.0)
    study = longer(study).model_copy(update={"corruption": flipped})
    runs, problem = runs_of(study.methods[1], 0.5, 0.25), build_problem(study, None)
    checkpoint = checkpoint_of(tmp_path, runs)
    expected = train_group(study, problem, runs)
    train_group(study, problem, runs, checkpoint, AT_25)
    assert_same(train_group(study, problem, runs, checkpoint), expected)


def test_a_state_of_other_circumstances_or_a_damaged_one_is_not_gone_on_from(
    tmp_path: Path, study: Study
) -> None:
    tmp_path, runs = tmp_path / "states", runs_of(study.methods[0], 0.5)
    checkpoint = checkpoint_of(tmp_path, runs)
    assert checkpoint.read() is None
    checkpoint.write({"done": 3, "leaf": torch.ones(2)})
    assert checkpoint_of(tmp_path, runs).read() == {"done": 3, "leaf": pytest.approx([1, 1])}
    assert checkpoint_of(tmp_path, runs, "another device").read() is None
    whole = checkpoint.path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        checkpoint.path.write_bytes(content)
        assert checkpoint.read() is None
        assert Checkpoints(tmp_path, "here", 0.0).begun({str(runs[0].label): runs[0]}) == []
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_not_due_is_not_written(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path, ["key"], "here", seconds=0.0).due
    assert not Checkpoint(tmp_path, ["key"], "here", seconds=3600.0).due


def test_the_groups_that_were_begun_stay_together(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "here", 0.0)
    for keys in (["a", "b"], ["c", "d"], ["e"]):
        checkpoints.of(keys).write({})
    Checkpoints(tmp_path, "there", 0.0).of(["f", "g"]).write({})
    (tmp_path / "c.json").touch()  # recorded
    missing = {key: key.upper() for key in "abdfgh"}
    assert checkpoints.begun(missing) == [["A", "B"]]
    left = {
        key for path in tmp_path.glob("*.pt") for key in torch.load(path, weights_only=True)["keys"]
    }
    assert left == {"a", "b", "e", "f", "g"}


@pytest.mark.slow
def test_a_sweep_goes_on_with_the_groups_that_were_begun_and_removes_their_states(
    study: Study, tmp_path: Path
) -> None:
    study = longer(study)
    runs = tuning_runs(study)
    expected = Sweep(study, tmp_path / "undisturbed", None, pytest.fail)
    expected.complete(runs, 1, lambda _: None)

    out = tmp_path / "out"
    sweep = Sweep(study, out, None, pytest.fail, checkpoint_seconds=0.0)
    begun = [run for run in runs if run.method.name == "agreement"][::-1]
    keys = [run.key(study, sweep.digest) for run in begun]
    train_group(study, build_problem(study, None), begun, sweep.checkpoints().of(keys), AT_25)
    assert len(list(out.glob("runs/*.pt"))) == 1
    steps: list[int] = []
    sweep.complete(runs, 1, steps.append)
    assert sum(steps) == ITERATIONS * len(runs)
    assert list(out.glob("runs/*.pt")) == []
    stores = Store(out), Store(tmp_path / "undisturbed")
    for run in runs:
        key = run.key(study, sweep.digest)
        params, others = (store.params(key) for store in stores)
        assert params is not None and others is not None
        assert all(torch.equal(params[name], others[name]) for name in params)
        record, other = sweep.records[run.label], expected.records[run.label]
        assert as_text(record) == as_text(other)


Process: TypeAlias = "subprocess.Popen[str]"
Start: TypeAlias = Callable[..., Process]
TELLING = """
import sys
from gradagree_opt.ablation.report import artefacts
artefacts.draw = lambda *_: {}  # nobody looks at them here
from gradagree_opt.ablation.training.training import Group
restore = Group.restore
def told(self, state):
    print("went on from", state["program"]["done"], file=sys.stderr)
    restore(self, state)
Group.restore = told
from gradagree_opt.cli import app
app()
"""


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Process] = []

    def start(study: Path, out: Path, device: str, *options: str) -> Process:
        arguments = ["ablate", str(study), "--out", str(out), "--device", device, *options]
        process = subprocess.Popen(
            [sys.executable, "-c", TELLING, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
@each_device
def test_a_study_killed_within_its_runs_goes_on_with_the_same_result(
    start: Start, tmp_path: Path, device: str
) -> None:
    study = tmp_path / "tiny.yaml"
    study.write_text(TINY.replace("iterations: 5", "iterations: 200\ncompile: false"))
    options = ("--jobs", "1", "--checkpoint-seconds", "0")
    undisturbed = start(study, tmp_path / "undisturbed", device, "--jobs", "1")
    out = tmp_path / "out"
    process = start(study, out, device, *options)
    deadline = time.monotonic() + 300
    while not any(done(path) >= 50 for path in out.glob("runs/*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(out.glob("runs/*.json")) == []
    again = start(study, out, device, *options)
    for each in (again, undisturbed):
        _, errors = each.communicate(timeout=600)
        assert each.returncode == 0, errors
        assert ("went on from" in errors) == (each is again)
    assert list(out.glob("runs/*.pt")) == []
    names = sorted(path.name for path in out.glob("runs/*.npz"))
    assert len(names) == 9
    for name in names:
        found, expected = (folder / "runs" / name for folder in (out, tmp_path / "undisturbed"))
        assert found.read_bytes() == expected.read_bytes()
    for name in ("table.md", "methods.md"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def done(path: Path) -> int:
    """The outer steps of a state, 0 where it has just been removed."""
    try:
        steps: int = torch.load(path, weights_only=True)["state"]["program"]["done"]
    except FileNotFoundError:
        return 0
    return steps
