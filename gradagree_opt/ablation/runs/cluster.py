"""Workers of a Ray cluster: what it has room for, whether its nodes are alike, and groups there."""

import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

import torch

from gradagree_opt.ablation.runs.job import Found, Job, Task, Tell
from gradagree_opt.ablation.runs.nodes import (
    Home,
    Node,
    compare,
    look_around,
    of_node,
    perform_there,
)
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.training.devices import CPU
from gradagree_opt.ablation.training.run import Run
from gradagree_opt.frameworks import require

require("ray")
import ray  # noqa: E402 - after require, whose error names the install command
from ray.exceptions import (  # noqa: E402
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.queue import Queue  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

SECONDS_TO_ANSWER = 10.0


class Cluster:
    """A Ray cluster that this process uses while the context lasts.

    Args:
        address: As for ``ray.init``; None for the cluster that Ray finds or, where it finds none,
            a new one of this machine alone.
        jobs: The most groups of runs at a time, None for as many as there is room for.

    Raises:
        StudyError: No cluster answers at the address.
    """

    def __init__(self, address: str | None = None, jobs: int | None = None) -> None:
        self.address, self.jobs = address, jobs
        self.connected_here = False

    def __enter__(self) -> "Cluster":
        if ray.is_initialized():
            if self.address is not None:
                raise StudyError(
                    f"expected Ray not to be initialized yet for the address {self.address!r}, "
                    "found that it is; leave the address out to use that cluster"
                )
            return self
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            check_answer(self.address)
            with kept_handler(signal.SIGTERM):
                ray.init(
                    self.address,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="error",
                )
        except (OSError, ValueError, RuntimeError, RayError, SystemExit) as failure:
            raise StudyError(
                f"expected a Ray cluster at {self.address or 'this machine'}, found none: "
                f"{first_line(failure)}; start one with `ray start --head`, or set "
                "RAY_AUTH_MODE=token for one that has a token"
            ) from None
        self.connected_here = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.connected_here:
            ray.shutdown()

    def choose_device(self, wanted: str) -> torch.device:
        """The device that a study asks for; "auto" is a GPU where the cluster has one.

        Raises:
            StudyError: The cluster has no such device, or it is one of several by its number.
        """
        if wanted.startswith("cuda:"):
            raise StudyError(
                "expected the device auto, cpu or cuda with Ray, which chooses among the GPUs, "
                f"found {wanted!r}; give cuda"
            )
        has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
        if wanted == "cuda" and not has_gpu:
            raise StudyError(
                "expected a GPU in the Ray cluster for the device 'cuda', found none; give cpu"
            )
        return torch.device("cuda", 0) if has_gpu and wanted != "cpu" else CPU

    def slots(self, device: torch.device) -> int:
        """How many groups of runs are done at a time: one a core, or one a GPU.

        Raises:
            StudyError: None can be.
        """
        resource = resource_of(device)
        count = int(ray.cluster_resources().get(resource, 0))
        if count < 1:
            raise StudyError(f"expected a {resource} in the Ray cluster, found none; add a node")
        return count if self.jobs is None else self.jobs

    def look(self, job: Job, run: Run) -> list[Node]:
        """The nodes that groups may be done on, each of which has prepared the job.

        Args:
            run: One of the job's.

        Raises:
            StudyError: There is none; or one has other versions, data or modules, or lacks a
                compiler, and the sentence names it.
        """
        self.slots(job.device)
        resource = resource_of(job.device)
        nodes = [each for each in ray.nodes() if each["Alive"] and each["Resources"].get(resource)]
        home = Home.of(job.study)
        with errors_of_ray():
            asked = [[on(node, version, name) for name in home.versions] for node in nodes]
            for node, answers in zip(nodes, asked, strict=True):
                try:
                    compare(
                        home.versions, dict(zip(home.versions, map(answer, answers), strict=True))
                    )
                except StudyError as mistake:
                    name, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
                    raise of_node(name, address, mistake) from None
            pickled, gpus = pickle.dumps(job), int(resource == "GPU")
            looks = [on(node, look_around, home, pickled, run, num_gpus=gpus) for node in nodes]
            found: list[Node] = ray.get(looks)
        return found

    def workers(self, job: Job, hear: Tell) -> "Nodes":
        """What does groups of the job.

        Args:
            hear: Called with what is told on the way.
        """
        return Nodes(job, self.jobs, hear)


class Nodes:
    """Groups of runs given to Ray, which has each done on a core or a GPU of its own."""

    deaths: tuple[type[Exception], ...] = (
        NodeDiedError,
        ObjectLostError,
        OutOfMemoryError,
        WorkerCrashedError,
    )

    def __init__(self, job: Job, jobs: int | None, hear: Tell) -> None:
        self.at_once, self.hear = jobs, hear
        gpus = int(resource_of(job.device) == "GPU")
        self.perform = ray.remote(max_retries=0, num_cpus=1, num_gpus=gpus)(perform_there)
        self.home, self.job = Home.of(job.study), ray.put(pickle.dumps(job))
        # beside a worker that waits to tell something, not in the place of one
        self.told = Queue(actor_options={"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1})
        self.pending: dict[Future[Found], Any] = {}

    def submit(self, task: Task, /) -> "Future[Found]":
        self.pending = {each: ref for each, ref in self.pending.items() if not each.done()}
        reference = self.perform.remote(self.home, self.job, task, self.told.put)
        future: Future[Found] = reference.future()
        self.pending[future] = reference
        return future

    def listen(self) -> None:
        if count := self.told.qsize():
            for message in self.told.get_nowait_batch(count):
                self.hear(message)

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(RayError):  # of a cluster that is gone
            for future, reference in self.pending.items():
                if not future.done():
                    ray.cancel(reference, force=True)
            self.told.shutdown(force=True)
        if isinstance(error, RayError):
            with errors_of_ray():
                raise error


def on(node: Any, function: Callable[..., object], *arguments: object, num_gpus: int = 0) -> Any:
    """Has the function called on a node, beside what is done there."""
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    remote = ray.remote(max_retries=0, num_cpus=0, num_gpus=num_gpus)(function)
    return remote.options(scheduling_strategy=place).remote(*arguments)


def answer(asked: Any) -> str | None:
    """The version of a package that a node was asked for, None where it is missing there."""
    try:
        found: str = ray.get(asked)
    except PackageNotFoundError:
        return None
    return found


def resource_of(device: torch.device) -> str:
    """What Ray calls that of which a group of runs takes one."""
    return "CPU" if device.type == "cpu" else "GPU"


@contextmanager
def kept_handler(number: int) -> Iterator[None]:
    """Gives a signal back the handler that somebody had set: ``ray.init`` sets its own."""
    own = signal.getsignal(number)
    try:
        yield
    finally:
        if callable(own) and threading.current_thread() is threading.main_thread():
            signal.signal(number, own)


def check_answer(address: str | None) -> None:
    """Raises an OSError if nothing listens there, which Ray would take minutes to find out."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_ANSWER).close()


@contextmanager
def errors_of_ray() -> Iterator[None]:
    """Raises what a worker has raised as it was, and anything else of Ray's as a StudyError."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        raise cause from (None if isinstance(cause, StudyError) else error)
    except RayError as error:
        raise StudyError(f"the Ray cluster has failed: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
