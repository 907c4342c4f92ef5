"""The files a study leaves in its output folder, all rebuilt from the recorded runs."""

import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from gradagree_opt.ablation import figures, style, tables
from gradagree_opt.ablation.adaptation import adaptation
from gradagree_opt.ablation.citations import bibtex, methods_text
from gradagree_opt.ablation.models import Params
from gradagree_opt.ablation.page import html
from gradagree_opt.ablation.problem import build_problem
from gradagree_opt.ablation.recorded import CONFIG, Config
from gradagree_opt.ablation.records import FORMAT, Store, write_atomically
from gradagree_opt.ablation.study import Study, StudyError
from gradagree_opt.ablation.sweep import Results

PACKAGES = ("gradagree-opt", "torch", "numpy", "scipy", "pandas", "matplotlib")


def prepare_folder(folder: Path, study: Study) -> None:
    """Makes sure that the folder is this study's, or free, and can be written to.

    Raises:
        StudyError: It is not; nothing was changed.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            check_owner(folder, study)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except FileExistsError:
        raise StudyError(f"--out {folder} is a file; give a folder") from None
    except OSError as error:
        raise StudyError(f"--out {folder} cannot be written to: {error.strerror}") from None


def check_owner(folder: Path, study: Study) -> None:
    config = folder / CONFIG
    if not config.exists():
        raise StudyError(f"--out {folder} is not empty and holds no study; give another folder")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        owner, found = content["study"]["name"], content.get("format", 1)
    except (ValueError, KeyError, TypeError):
        raise StudyError(f"{config} is not a study's; give another --out") from None
    if found != FORMAT:
        raise StudyError(
            f"--out {folder} holds runs of format {found!r}, and this version writes format "
            f"{FORMAT}; give another --out"
        )
    if owner != study.name:
        raise StudyError(
            f"--out {folder} holds the study {owner!r}, not {study.name!r}; give another --out"
        )


def write_config(
    folder: Path, study: Study, command: list[str], data: Path | None, digest: str | None
) -> Config:
    """The resolved study, accepted in place of a study file, and what it ran on."""
    config = Config(
        study=study,
        format=FORMAT,
        command=command,
        data=None if data is None else str(data),
        data_sha256=digest,
        python=platform.python_version(),
        machine=platform.machine(),
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
    )
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / CONFIG, text.encode())
    return config


def write_artefacts(folder: Path, results: Results, config: Config) -> None:
    """Tables, figures, the page and what to cite; the same runs give the same files."""
    write_atomically(folder / "results.csv", tables.all_runs(results).to_csv(index=False).encode())
    write_atomically(folder / "table.csv", tables.numbers(results).to_csv(index=False).encode())
    write_atomically(folder / "table.md", tables.markdown(results).encode())
    write_atomically(folder / "table.tex", tables.latex(results).encode())
    write_atomically(folder / "methods.md", methods_text(config).encode())
    write_atomically(folder / "references.bib", bibtex(config).encode())
    pictures = draw(folder, results, config.data_sha256)
    for name, figure in pictures.items():
        for kind in ("png", "pdf"):
            write_atomically(folder / f"{name}.{kind}", style.save(figure, kind))
    write_atomically(folder / "report.html", html(results, config, pictures).encode())


def draw(folder: Path, results: Results, digest: str | None) -> dict[str, Figure]:
    """The figures of a study, by name."""
    with matplotlib.rc_context(style.STYLE):
        pictures = {
            "learning-curves": figures.learning_curves(results),
            "tuned-rates": figures.tuned_rates(results),
            "agreement": figures.agreement(results),
        }
        trained = trained_params(folder, results, digest)
        if results.study.tasks.kind == "sine" and trained:
            problem = build_problem(results.study, None)
            pictures["adaptation"] = adaptation(results, problem, trained)
    return pictures


def trained_params(folder: Path, results: Results, digest: str | None) -> dict[str, Params]:
    """The parameters of each method's first seed, those that are kept."""
    store = Store(folder)
    keys = {name: results.final(name)[0].run.key(results.study, digest) for name in results.rates}
    kept = {name: store.params(key) for name, key in keys.items()}
    return {name: params for name, params in kept.items() if params is not None}
