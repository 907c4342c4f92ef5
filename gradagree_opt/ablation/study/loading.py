"""Reading a study file, with every mistake in it named by file and line."""

import json
import os
import reprlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gradagree_opt.ablation.section import StudyError, meant
from gradagree_opt.ablation.study.nodes import (
    GIVEN,
    child,
    locate,
    merge_nodes,
    printable,
    read_file,
    read_mapping,
)
from gradagree_opt.ablation.study.study import Study

MOST_SHOWN = 200  # characters of a value
OWN = ("name", "title")  # not inherited: two studies of one name would share an output folder


def shipped() -> dict[str, Path]:
    """The studies that come with the package, by name."""
    folder = Path(str(files("gradagree_opt.ablation"))) / "studies"
    return {
        name: folder / f"{name}.yaml"
        for name in sorted(path.stem for path in folder.glob("*.yaml"))
    }


def load(
    source: str | Mapping[str, Any],
    *,
    quick: bool = False,
    seeds: list[int] | None = None,
    iterations: int | None = None,
) -> Study:
    """Reads a study.

    Args:
        source: The name of a shipped study, the path of a YAML file, or the ``config.json`` that a
            study left in its output folder; or what a file says, as a mapping. A file may say
            ``extends``, with another study's name or its path from there, and give only what
            differs, its own name and title included.
        quick: Apply the file's ``quick`` section; the study's name then ends in ``-quick``.
        seeds: Take the place of the study's, those of its quick form too.
        iterations: Likewise.

    Raises:
        StudyError: In one sentence naming file and line, if the file is missing, no YAML, or
            differs from the schema.
    """
    try:
        if isinstance(source, Mapping):
            path = GIVEN
            document, root = extended(path, *read_mapping(source))
        else:
            path = shipped().get(source, Path(source))
            document, root = read(path)
        given = {"seeds": seeds, "iterations": iterations}
        changes = {key: value for key, value in given.items() if value is not None}
        return resolve(path, document, root, quick, changes)
    except FileNotFoundError:
        raise no_study(source) from None
    except RecursionError:
        raise StudyError(f"{path}: expected a study, found one nested too deeply") from None


def resolve(
    path: Path, document: dict[str, Any], root: yaml.Node, quick: bool, changes: dict[str, Any]
) -> Study:
    """The study of a file, in its quick form where that is wanted, with the changes in the end."""
    study = parse(path, document, root)
    options = [f"--{key}" for key in changes]
    if study.quick is None:
        if quick:
            raise StudyError(f"{path}: --quick needs a 'quick' section, and there is none")
    else:
        whole = merge_nodes(root, child(root, "quick"))
        fast = parse(path, merge(document, document["quick"]), whole, ", under --quick")
        if fast.name != study.name:
            place = locate(path, whole, ("name",))
            raise StudyError(f"{place}: the 'quick' section cannot rename the study")
        if quick:
            name = {"name": f"{study.name}-quick", "quick": None}
            document, root = merge(document, document["quick"]) | name, whole
            study = fast.model_copy(update=name)
            options = ["--quick", *options]
    if changes:
        study = parse(path, document | changes, root, f", under {' '.join(options)}")
    return study


def read(path: Path, extending: tuple[Path, ...] = ()) -> tuple[dict[str, Any], yaml.Node]:
    """The keys of a study file and of those it extends, and the nodes that they stand at.

    Args:
        extending: The files that extend this one.

    Raises:
        FileNotFoundError: There is no such file.
        StudyError: It cannot be read, or extends what is no study.
    """
    return extended(path, *read_file(path), extending)


def extended(
    path: Path, document: dict[str, Any], root: yaml.Node, extending: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], yaml.Node]:
    """The keys and nodes of a file together with those of what it extends; as :func:`read`."""
    if "extends" not in document:
        return document, root
    named = document.pop("extends")
    place = locate(path, root, ("extends",))
    if not isinstance(named, str) or not could_be_file(named):
        raise no_study(named, f"{place}: ")
    other = shipped().get(named, path.parent / named)
    if other.resolve() in [file.resolve() for file in (*extending, path)]:
        raise StudyError(f"{place}: {named!r} extends this file; one of them has to be complete")
    try:
        base, base_root = read(other, (*extending, path))
    except FileNotFoundError:
        raise no_study(named, f"{place}: ") from None
    for key in OWN:
        base.pop(key, None)
    base_root.value = [pair for pair in base_root.value if pair[0].value not in OWN]
    return merge(base, document), merge_nodes(base_root, root)


def merge(document: Any, override: Any) -> Any:
    """The document with the override's keys in place of its own.

    Lists are replaced whole, and sections of another kind.
    """
    if not (isinstance(document, dict) and isinstance(override, dict)):
        return override
    if "kind" in override and override["kind"] != document.get("kind"):
        return override
    return document | {key: merge(document.get(key), value) for key, value in override.items()}


def parse(path: Path, document: dict[str, Any], root: yaml.Node, form: str = "") -> Study:
    """Validates a document whose keys stand at the nodes; a mistake is told of that form of it."""
    try:
        return Study.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt key is also a missing one; the first is the better news.
        problem = min(problems, key=lambda problem: problem["type"] != "unknown_key")
        cause = problem.get("ctx", {}).get("error")
        place = locate(path, root, problem["loc"] + getattr(cause, "location", ()))
        raise StudyError(printable(f"{place}: {explain(problem)}{form}")) from None


def explain(problem: Any) -> str:
    match problem["type"]:
        case "missing":
            return f"the key {problem['loc'][-1]!r} is missing"
        case "value_error" | "unknown_key":
            return str(problem["ctx"]["error"])
        case "union_tag_not_found":
            return "the key 'kind' is missing"
        case "union_tag_invalid":
            return f"expected {problem['ctx']['expected_tags']}, found {problem['ctx']['tag']!r}"
        case "too_short" | "too_long":
            size = problem["ctx"]
            bound = size.get("min_length", size.get("max_length"))
            least = "least" if "min_length" in size else "most"
            return f"expected at {least} {bound} in the list, found {size['actual_length']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            message = "expected keys with their values"
        case _:
            message = problem["msg"].replace("Input should be", "expected")
    return f"{message}, found {shown(problem['input'])}"


def no_study(named: Any, place: str = "") -> StudyError:
    """What is said of a name that is no study's, at its place in a file."""
    path = named if isinstance(named, str) else ""
    if path.endswith((".yaml", ".yml", ".json")) or "/" in path:
        return StudyError(f"{place}expected a study file, found no file {named!r}")
    return StudyError(
        f"{place}expected a study file or a shipped study, found {shown(named)}; "
        f"{meant(path, shipped())}"
    )


def shown(value: Any) -> str:
    """A value as the file may have it, or its beginning."""
    try:
        text = json.dumps(value, default=str)
        return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
    except (TypeError, ValueError):  # a date as key, a list that holds itself
        return reprlib.repr(value)


def could_be_file(name: str) -> bool:
    """Whether the system takes it as a name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False
