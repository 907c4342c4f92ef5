"""Writes troubleshooting.md: every message that the library raises, with its cause and its cure.

    python docs/troubleshooting.py [FOLDER]

reads the messages from the source, so that none can be missing or out of date, and groups them by
the part of the library that raises them. Causes and cures are in troubleshooting.yaml.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SOURCES = {"gradagree_opt": ROOT / "gradagree_opt", "adapters": ROOT / "adapters"}
GROUPS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))


def template(node: ast.expr, names: Mapping[str, str]) -> str | None:
    """A message with … for what is filled in; None where the expression is no literal text.

    Args:
        names: the texts of variables, which are put in where they stand.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, names) or "…" for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return names.get(node.value.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        halves = template(node.left, names), template(node.right, names)
        return "".join("…" if half is None else half for half in halves)
    return None


def variables(tree: ast.Module) -> dict[str, str]:
    """The texts of the variables that a file gives one text to."""
    texts: dict[str, set[str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            texts.setdefault(node.targets[0].id, set()).add(template(node.value, {}))
    return {name: text for name, (text, *others) in texts.items() if text and not others}


def messages(file: Path) -> Iterator[tuple[str, str]]:
    """The kind and the text of every error and warning that a file makes."""
    tree = ast.parse(file.read_text("utf-8"))
    names = variables(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name == "AttributeError":  # in Python's own words
            continue
        if name.endswith(("Error", "Exit")) or name == "warn":
            text = template(node.args[0], names)
            if text is not None and " " in text:
                yield ("warning" if name == "warn" else name), text


def found() -> dict[str, list[tuple[str, str]]]:
    """The messages by file, as `core/stacks.py`."""
    return {
        (f"adapters/{file.name}" if room == "adapters" else str(file.relative_to(folder))): texts
        for room, folder in SOURCES.items()
        for file in sorted(folder.rglob("*.py"))
        if (texts := list(dict.fromkeys(messages(file))))
    }


def group(file: str) -> str:
    """The title of the group that a file's messages belong to.

    Raises:
        LookupError: no group names the file.
    """
    for each in GROUPS:
        if any(file.startswith(place) for place in each["files"]):
            return str(each["title"])
    raise LookupError(
        f"expected a group for the messages of {file}, found none; add it to troubleshooting.yaml"
    )


def code(text: str) -> str:
    """A message as a code span, whatever ticks it has."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def page() -> str:
    """The page, in Markdown."""
    lines = [
        "# Troubleshooting",
        "",
        (
            "Every message of the library says what it expected, what it found, and, after the "
            "semicolon, what to do. Here they all are, by the part of the library that they come "
            "from: search for some words of yours. An … stands for what is filled in."
        ),
        "",
        "(Written from the source by [troubleshooting.py](troubleshooting.py).)",
    ]
    texts = found()
    for each in GROUPS:
        lines += ["", f"## {each['title']}", ""]
        lines += [f"**Cause.** {each['cause']}", "", f"**Cure.** {each['cure']}", ""]
        unique = sorted({t for file in texts if group(file) == each["title"] for t in texts[file]})
        lines += [f"- {code(' '.join(text.split()))} ({kind})" for kind, text in unique]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    (target / "troubleshooting.md").write_text(page(), "utf-8")
