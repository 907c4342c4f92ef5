"""Ablation studies: a study file in, runs and a report out."""

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradagree_opt.ablation.conduct import Results

__all__ = ["ablate"]


def ablate(
    study: str | PathLike[str] | Mapping[str, Any],
    *,
    out: str | PathLike[str],
    data: str | PathLike[str] | None = None,
    jobs: int | None = None,
    quick: bool = False,
    seeds: list[int] | None = None,
    iterations: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    progress: bool = False,
) -> "Results":
    """Runs a study, or what is missing of it, and writes its report, as ``gradagree ablate`` does.

    Args:
        study: the name of a shipped study, the path of a study file or of a run's ``config.json``,
            or what a study file says as a mapping.
        out: output folder; one that holds finished runs of the study is gone on with.
        data: the path that the command takes as ``--data``.
        jobs: processes, all cores if it is None. More than one start this program's main module
            anew, so a script calls this below ``if __name__ == "__main__":``. On a cluster, the
            most groups of runs at a time, as many as there is room for if it is None.
        quick: whether to run the study's small form.
        seeds: in place of the study's.
        iterations: in place of the study's.
        engine: "local", this machine, or "ray", a Ray cluster: the one that is connected to
            already, or that of ``ray_address``.
        ray_address: as for ``ray.init``; None for the cluster that Ray finds or, where it finds
            none, a new one of this machine.
        progress: whether to show on standard error how far it is, as the command does.

    Returns:
        The folder, every run as a DataFrame ``.runs``, and the table as a DataFrame ``.table``.

    Raises:
        StudyError: a ValueError; in one sentence, the study, its data, the folder or a node of the
            cluster is not as it should be, and nothing was done; or processes died of some of its
            runs, and the finished ones are in the folder.
        OSError: the folder cannot be written to; the finished runs are in it.
        TypeError: ``data`` is no path.
        ImportError: the extra "ablation" is not installed.

    Warns:
        UserWarning: a record is damaged, other versions did some of the runs, or there is no
            compiler.

    >>> import tempfile
    >>> study = {"extends": "sine", "name": "two", "title": "Two methods",
    ...          "outer": {"rates": [0.5]}, "baseline": "mean", "compile": False,
    ...          "test": {"tasks": 5}, "tuning": {"tasks": 5},
    ...          "methods": [{"name": "mean", "aggregator": "mean"},
    ...                      {"name": "agreement", "aggregator": "gradient_agreement"}]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     results = ablate(study, out=folder, jobs=1, seeds=[0, 1], iterations=2)
    >>> results.runs.columns.tolist()
    ['method', 'rate', 'seed', 'chosen', 'validation_loss', 'steps', 'mse']
    >>> len(results.runs)  # two methods, two seeds, five numbers of gradient steps at the test
    20
    """
    import sys
    import warnings
    from pathlib import Path

    from gradagree_opt.options import check_count

    try:
        from gradagree_opt.ablation.conduct import connected, prepare
        from gradagree_opt.ablation.section import StudyError, arguments
        from gradagree_opt.ablation.study.loading import load
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("gradagree_opt"):
            raise
        raise ImportError(
            f"expected the packages of the extra ablation, found no {missing.name}; install them "
            "with: pip install 'gradagree-opt[ablation]'",
            name=missing.name,
        ) from missing

    def warn(sentence: str) -> None:
        warnings.warn(arguments(sentence), stacklevel=3)

    if not isinstance(data, str | PathLike | None):
        raise TypeError(
            f"expected data to be a path, found {type(data).__name__}; write it to a file, which "
            "tasks of your own can read"
        )
    count = None if jobs is None else check_count("jobs", jobs, least=1)
    source = study if isinstance(study, Mapping) else str(study)
    folder = None if data is None else Path(data)
    command = ["python", *sys.argv]
    try:
        loaded = load(source, quick=quick, seeds=seeds, iterations=iterations)
        with connected(engine, ray_address, count) as cluster:
            prepared = prepare(loaded, Path(out), folder, command, warn, cluster=cluster)
            return (prepared.run_displayed if progress else prepared.run)(count)
    except StudyError as mistake:
        raise StudyError(arguments(str(mistake))) from mistake.__cause__
