"""Where groups of runs are trained: in this process, in others of this machine, or on a cluster."""

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from gradagree_opt.ablation.runs.job import Found, Job, Task, Tell
from gradagree_opt.ablation.runs.processes import Processes, ThisProcess
from gradagree_opt.ablation.runs.workers import execute
from gradagree_opt.ablation.training.grouping import groups
from gradagree_opt.ablation.training.run import Run

if TYPE_CHECKING:
    from gradagree_opt.ablation.runs.cluster import Cluster, Nodes

Workers: TypeAlias = "ThisProcess | Processes | Nodes"


class Settings(NamedTuple):
    """How many groups at a time, how large, and where.

    Attributes:
        jobs: Processes of this machine.
        largest: The most runs in a group.
        cluster: What takes the place of this machine.
    """

    jobs: int
    largest: int
    cluster: "Cluster | None"


def train(
    job: Job,
    begun: list[list[Run]],
    others: list[Run],
    build_task: Callable[[list[Run]], Task],
    hear: Tell,
    settings: Settings,
) -> Generator[Found, None, None]:
    """Trains groups of runs and yields what each finds, as they end; a GPU here does all at once.

    Args:
        begun: Groups that go on from what was saved.
        others: The other runs.
        build_task: Adds to a group what was saved of it by then.
        hear: Called with what is told on the way.

    Raises:
        StudyError: Workers cannot do the job, or die of a group.
    """
    jobs, largest, cluster = settings
    if cluster is None and job.device.type != "cpu":
        yield from job.perform_all(list(map(build_task, begun)), others, hear)
        return
    tasks = begun + groups(others, largest)
    workers: Workers
    if cluster is not None:
        workers = cluster.workers(job, hear)
    elif jobs == 1:
        workers = ThisProcess(job, hear)
    else:
        workers = Processes(job, min(jobs, len(tasks)), hear)
    with workers:
        yield from execute(workers, tasks, lambda runs: workers.submit(build_task(runs)), name)


def name(runs: list[Run]) -> str:
    """What a group is called in a sentence.

    >>> from gradagree_opt.ablation.study.methods import Method
    >>> mean = Method(name="mean", aggregator="mean")
    >>> name([Run(method=mean, rate=rate, seed=3) for rate in (0.5, 0.25)])
    "the runs of 'mean' at 0.5 from seed 3, at 0.25 from seed 3"
    """
    labels = ", ".join(f"at {run.rate:g} from seed {run.seed}" for run in runs)
    return f"the run{'s' * (len(runs) > 1)} of {runs[0].method.name!r} {labels}"
