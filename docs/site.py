"""What mkdocs shows beside docs/: pages made of README.md and others, and links that lead there.

`make docs` builds the site with this module as a hook (mkdocs.yml). The pages are written for the
repository; here the links of those outside docs/ are made relative to the site, and a link to a
file that the site does not have becomes its text.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

import gradagree_opt as ga
from gradagree_opt import tasks

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "sine.yaml": "gradagree_opt/ablation/studies/sine.yaml",
}
"""Pages of the site, and what each is in the repository."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def api() -> str:
    """The page of all public names, from their docstrings."""
    lines = ["# API reference", "", "`ga` is `gradagree_opt` in all examples.", ""]
    for title, names in public():
        lines += [f"## {title}", "", *(f"::: {name}\n" for name in names)]
    return "\n".join(lines)


def public() -> Iterator[tuple[str, list[str]]]:
    """The title of each part, and where its names are defined."""
    for module, exported in (("gradagree_opt", ga.__all__), ("gradagree_opt.tasks", tasks.__all__)):
        yield module, [f"{module}.{name}" for name in sorted(exported, key=str.lower)]
    yield "gradagree_opt.ablation", ["gradagree_opt.ablation.ablate"]
    # Adapters are read, not imported: their frameworks may be absent.
    for file in sorted((ROOT / "adapters").glob("*.py")):
        text = file.read_text("utf-8")
        names = re.search(r"^__all__ = (\[.*?\])", text, re.DOTALL | re.MULTILINE)
        if names is not None:
            module = f"gradagree_opt.adapters.{file.stem}"
            places = []
            for name in ast.literal_eval(names[1]):
                other = re.search(rf"^from (\S+) import .*\b{name}\b", text, re.MULTILINE)
                place = module if other is None else other[1]
                places.append(re.sub(r"^gradagree_opt\.(?=adapters)", "", f"{place}.{name}"))
            yield module, places


def tour() -> str:
    """docs/tour.py as a page: its comments are the prose, the rest is code."""
    text = (ROOT / "docs/tour.py").read_text("utf-8")
    head, *cells = re.split(r"^# %%", text, flags=re.MULTILINE)
    _, introduction, imports = head.split('"""')
    page = ["# A tour in ten minutes", "", introduction.strip(), ""]
    page += ["```python", imports.strip(), "```", ""]
    for cell in cells:
        title, _, body = cell.strip("\n").partition("\n")
        prose = re.match(r"(?:#.*\n)*", body)
        assert prose is not None
        page += [f"## {title.strip()}", "", re.sub(r"(?m)^# ?", "", prose[0])]
        page += ["```python", body[prose.end() :].strip("\n"), "```", ""]
    return "\n".join(page)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in docs/."""
    texts = {page: (ROOT / source).read_text("utf-8") for page, source in OUTSIDE.items()}
    for page, text in {**texts, "api.md": api(), "tour.md": tour()}.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Turns the links of the repository into those of the site, and doctests into blocks."""
    here = page.file.src_uri
    source = OUTSIDE.get(here, f"docs/{here}")
    pages = {repository: site for site, repository in OUTSIDE.items()}

    def mend(link: re.Match[str]) -> str:
        mark, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target or re.match(r"\w+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = pages.get(path, path.removeprefix("docs/"))
        if path == "docs/tour.py":
            place = "tour.md"
        shown = files.get_file_from_path(place)
        if shown is None or shown.inclusion.is_excluded():
            assert (ROOT / path).exists(), f"{source} links to {path}, which is not there"
            return text
        relative = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"{mark}[{text}]({relative}{anchor})"

    parts = CODE.split(fenced(markdown))
    text = "".join(part if CODE.fullmatch(part) else LINK.sub(mend, part) for part in parts)
    if here.startswith("results/"):  # without headings, and with tables as wide as the screen
        page.meta["hide"] = ["toc"]
        return f"# {page.file.name.title()} of {here.split('/')[1]}\n\n{text}"
    return unbroken(text)


def unbroken(markdown: str) -> str:
    """Numbers with their intervals, which no line break parts."""
    return re.sub(r"(?<=\d) ± (?=\d)", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", markdown)


def fenced(markdown: str) -> str:
    """Doctests that stand outside a fence, in one."""
    lines, inside, shown = markdown.split("\n"), False, False
    found: list[str] = []
    for line in lines:
        if line.startswith("```"):
            inside = not inside
        if not inside and not shown and line.startswith(">>> "):
            shown = True
            found.append("```python")
        elif shown and not line.strip():
            shown = False
            found.append("```")
        found.append(line)
    return "\n".join([*found, "```"] if shown else found)


def in_markdown(docstring: str) -> str:
    """A docstring without Sphinx's roles, a line for each of several names, its doctests fenced."""

    def alone(item: re.Match[str]) -> str:
        return "\n".join(f"{item[1]}{name}: {item[3]}" for name in item[2].split(", "))

    text = re.sub(r":\w+:`(?:~[\w.]*\.)?([\w.]+)`", r"`\1`", docstring)
    return fenced(re.sub(r"(?m)^( +)((?:[a-z]\w*, )+[a-z]\w*): (.*(?:\n\1 +\S.*)*)", alone, text))


class Docstrings(griffe.Extension):
    """Shows docstrings as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = in_markdown(obj.docstring.value)
