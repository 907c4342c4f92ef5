"""The files a study leaves in its output folder, all rebuilt from the recorded runs."""

import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path

from gradagree_opt.ablation import figures, tables
from gradagree_opt.ablation.problem import build_problem
from gradagree_opt.ablation.records import Store, write_atomically
from gradagree_opt.ablation.study import Study, StudyError
from gradagree_opt.ablation.sweep import Results

CONFIG = "config.json"
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
        owner = json.loads(config.read_text(encoding="utf-8"))["study"]["name"]
    except (ValueError, KeyError, TypeError):
        raise StudyError(f"{config} is not a study's; give another --out") from None
    if owner != study.name:
        raise StudyError(
            f"--out {folder} holds the study {owner!r}, not {study.name!r}; give another --out"
        )


def write_config(folder: Path, study: Study, command: list[str], digest: str | None) -> None:
    """The resolved study, accepted in place of a study file, and what it ran on."""
    content = {
        "study": study.model_dump(mode="json"),
        "command": command,
        "data_sha256": digest,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / CONFIG, text.encode())


def write_artefacts(folder: Path, results: Results, data: Path | None, digest: str | None) -> None:
    """Tables and figures; the same runs give the same files."""
    write_atomically(folder / "results.csv", tables.all_runs(results).to_csv(index=False).encode())
    write_atomically(folder / "table.csv", tables.numbers(results).to_csv(index=False).encode())
    write_atomically(folder / "table.md", tables.markdown(results).encode())
    write_atomically(folder / "table.tex", tables.latex(results).encode())
    pictures = {
        "learning-curves": figures.learning_curves(results),
        "agreement": figures.agreement(results),
    }
    if results.study.tasks.kind == "sine":
        store = Store(folder)
        trained = {
            name: store.params(results.final(name)[0].run.key(results.study, digest))
            for name in results.rates
        }
        problem = build_problem(results.study, data)
        pictures["adaptation"] = figures.adaptation(results, problem, trained)
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", figures.png(picture))
