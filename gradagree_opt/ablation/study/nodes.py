"""YAML with the place of every key: one file read, and where in it a mistake is."""

import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from gradagree_opt.ablation.section import StudyError

GIVEN = Path("the study that is given")
"""What stands for the file of a study that is given as a mapping."""
Location: TypeAlias = tuple[int | str, ...]


def read_mapping(given: Mapping[str, Any]) -> tuple[dict[str, Any], yaml.Node]:
    """The keys of a study that is given as a mapping, and nodes that have no lines to name."""
    try:
        loader = Loader(yaml.safe_dump(dict(given), sort_keys=False))
    except yaml.YAMLError:
        keys, value = next(unwritable(dict(given)), ((), given))
        place = f"{GIVEN} in {'.'.join(keys)!r}" if keys else str(GIVEN)
        raise StudyError(
            f"{place}: expected what a study file may say (text, numbers, lists and keys), "
            f"found {reprlib.repr(value)}"
        ) from None
    loader.name = str(GIVEN)
    root: Any = loader.get_single_node()
    document: dict[str, Any] = loader.construct_document(root)
    return document, root


def unwritable(value: Any, *keys: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The parts of a value that YAML cannot write, and the keys that lead to each."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from unwritable(part, *keys, str(key))
        return
    try:
        yaml.safe_dump(value)
    except yaml.YAMLError:
        yield keys, value


def read_file(path: Path) -> tuple[dict[str, Any], yaml.Node]:
    """The keys of one file, and its nodes."""
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        root: Any = loader.get_single_node()
        document = None if root is None else loader.construct_document(root)
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise StudyError(
            f"{path} is a folder; give a study file, as {path / 'config.json'}"
        ) from None
    except (OSError, ValueError) as error:
        raise StudyError(f"the study file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable characters"
        raise StudyError(printable(f"{path}{line}: not YAML: {problem}")) from None
    if not isinstance(document, dict):
        raise StudyError(f"{path}: expected the keys of a study, found {reprlib.repr(document)}")
    if path.suffix == ".json" and isinstance(document.get("study"), dict):
        return document["study"], child(root, "study")
    return document, root


def merge_nodes(root: yaml.Node, override: yaml.Node) -> yaml.Node:
    """The nodes of what :func:`merge` gives, each with its place in its own file."""
    if not (isinstance(root, yaml.MappingNode) and isinstance(override, yaml.MappingNode)):
        return override
    kinds = [getattr(child(node, "kind"), "value", None) for node in (root, override)]
    if kinds[1] not in (None, kinds[0]):
        return override
    pairs = {key.value: (key, value) for key, value in root.value}
    for key, value in override.value:
        own = pairs.get(key.value)
        pairs[key.value] = key, merge_nodes(own[1], value) if own else value
    return yaml.MappingNode(root.tag, list(pairs.values()), override.start_mark, override.end_mark)


def locate(path: Path, root: yaml.Node, location: Location) -> str:
    """File and line of a pydantic location, and those of its keys that the file has."""
    node, marked, keys = root, root, []
    for part in location:
        below = child(node, part)
        if below is None:  # a missing key, or pydantic's name for a member of a union
            continue
        marked = key_node(node, part) or below
        node = below
        keys.append(str(part))
    mark = marked.start_mark
    line = "" if mark.name == str(GIVEN) else f", line {mark.line + 1}"
    place = f"{mark.name}{line}" + (f" in {'.'.join(keys)!r}" if keys else "")
    return place if mark.name == str(path) else f"{place}, extended by {path}"


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


def printable(sentence: str) -> str:
    """The sentence in one line, whatever the names in it are."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in sentence)


class Loader(yaml.SafeLoader):
    """YAML's safe loader that also reads ``1e-3`` as a number, as JSON and YAML 1.2 do.

    A key that is given twice is a mistake; YAML would take the last. So is a value that is not what
    its tag says, or a date that does not exist, for which YAML raises whatever comes.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            problem = f"{reprlib.repr(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                problem = f"the key {key.value!r} is given more than once"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
