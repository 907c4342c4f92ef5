"""Reading a study file, with every mistake in it named by file and line."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import ValidationError

from gradagree_opt.ablation.study import Study, StudyError

Location: TypeAlias = tuple[int | str, ...]
Nodes: TypeAlias = dict[str, yaml.Node | None]


def shipped() -> dict[str, Path]:
    """The studies that come with the package, by name."""
    folder = Path(str(files("gradagree_opt.ablation"))) / "studies"
    return {
        name: folder / f"{name}.yaml"
        for name in sorted(path.stem for path in folder.glob("*.yaml"))
    }


def load(source: str, *, quick: bool = False) -> Study:
    """Reads a study.

    Args:
        source: The name of a shipped study, the path of a YAML file, or the ``config.json`` that a
            study left in its output folder.
        quick: Apply the file's ``quick`` section; the study's name then ends in ``-quick``.

    Raises:
        StudyError: In one sentence naming file and line, if the file is missing, no YAML, or
            differs from the schema.
    """
    path = shipped().get(source, Path(source))
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader)
        document = yaml.load(text, Loader)
    except FileNotFoundError:
        names = ", ".join(shipped())
        raise StudyError(f"expected a study file or one of {names}, found {source!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"the study file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable characters"
        raise StudyError(f"{path}{line}: not YAML: {problem}") from None
    if not isinstance(document, dict):
        raise StudyError(f"{path}: expected the keys of a study, found {document!r}")
    if path.suffix == ".json" and isinstance(document.get("study"), dict):
        document, root = document["study"], child(root, "study")
    study = parse(path, document, {"": root})
    if study.quick is None:
        if quick:
            raise StudyError(f"{path}: --quick needs a 'quick' section, and there is none")
        return study
    nodes = {"": root, "quick.": child(root, "quick")}
    fast = parse(path, merge(document, document["quick"]), nodes)
    if fast.name != study.name:
        number, _ = locate(nodes, ("name",))
        raise StudyError(f"{path}, line {number}: the 'quick' section cannot rename the study")
    return (
        fast.model_copy(update={"name": f"{study.name}-quick", "quick": None}) if quick else study
    )


def merge(document: Any, override: Any) -> Any:
    """The document with the override's keys in place of its own; lists are replaced whole."""
    if not (isinstance(document, dict) and isinstance(override, dict)):
        return override
    return document | {key: merge(document.get(key), value) for key, value in override.items()}


def parse(path: Path, document: dict[str, Any], nodes: Nodes) -> Study:
    """Validates a document whose keys stand at the nodes of the file, the later ones first."""
    try:
        return Study.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt key is also a missing one; the first is the better news.
        problem = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        cause = problem.get("ctx", {}).get("error")
        line, keys = locate(nodes, problem["loc"] + getattr(cause, "location", ()))
        place = f" in {keys!r}" if keys else ""
        raise StudyError(f"{path}, line {line}{place}: {explain(problem)}") from None


def explain(problem: Any) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {problem['loc'][-1]!r}"
        case "missing":
            return f"the key {problem['loc'][-1]!r} is missing"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            message = problem["msg"].replace("Input should be", "expected")
            return f"{message}, found {json.dumps(problem['input'], default=str)}"


def locate(nodes: Nodes, location: Location) -> tuple[int, str]:
    """The line of a pydantic location, and those of its keys that the file has."""
    found = []
    for prefix, root in nodes.items():
        node, marked, keys = root, root, []
        for part in location:
            below = child(node, part)
            if below is None:  # a missing key, or pydantic's name for a member of a union
                continue
            marked = key_node(node, part) or below
            node = below
            keys.append(str(part))
        if marked is not None:
            found.append((len(keys), marked.start_mark.line + 1, prefix + ".".join(keys)))
    depth = max(length for length, _, _ in found)
    return next((line, keys) for length, line, keys in reversed(found) if length == depth)


def child(node: yaml.Node | None, part: int | str) -> Any:
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
        return node.value[part] if part < len(node.value) else None
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == str(part)), None)
    return None


def key_node(node: yaml.Node | None, part: int | str) -> Any:
    if isinstance(node, yaml.MappingNode):
        return next((key for key, _ in node.value if key.value == str(part)), None)
    return None


class Loader(yaml.SafeLoader):
    """YAML's safe loader that also reads ``1e-3`` as a number, as JSON and YAML 1.2 do."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
