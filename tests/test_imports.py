"""Imports point one way: from what a user calls down to what everything stands on."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "core": "",
    "engines": "core batchnorm one_process",
    "loops": "engines core one_process",
    "meta": "engines core batchnorm one_process",
    "tasks": "frameworks",
    "adapters": "meta loops engines core tasks batchnorm functional frameworks one_process",
    "public": "meta loops engines core",
    "ablation": "adapters tasks meta engines core frameworks",
    "doctor": "frameworks",
    "cli": "ablation doctor",
}
"""The rooms that each may import; those that import none are open to all."""
OPEN = {"annotations", "options", "replacing", "stopping"}


def imports(file: Path) -> Iterator[str]:
    """The rooms of the package that a file imports from."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            if node.module == "gradagree_opt":
                modules = [f"gradagree_opt.{alias.name}" for alias in node.names]
        for module in modules:
            package, _, rest = module.partition(".")
            if package == "gradagree_opt" and rest:
                yield rest.split(".")[0]


def files(room: str) -> list[Path]:
    folder = ROOT / room if room == "adapters" else ROOT / "gradagree_opt" / room
    return [*folder.rglob("*.py")] or [folder.with_suffix(".py")]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_from_those_below_it_alone(room: str) -> None:
    allowed = {room, *ALLOWED[room].split(), *OPEN}
    found = {name for file in files(room) for name in imports(file) if name.islower()}
    assert found - allowed == set()


def test_every_room_is_named() -> None:
    rooms = {path.stem for path in (ROOT / "gradagree_opt").iterdir() if path.stem[0] != "_"}
    rooms -= {"py", "adapters"}
    below = {name for names in ALLOWED.values() for name in names.split()}
    assert rooms <= {*ALLOWED, *below, *OPEN}


def test_no_two_rooms_stand_on_each_other() -> None:
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [
            room
            for room, below in ALLOWED.items()
            if room not in order and set(below.split()) & set(ALLOWED) <= set(order)
        ]
        assert ready
        order += ready
