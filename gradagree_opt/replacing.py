"""Files that are replaced in one step."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unique_beside(path: Path, /) -> Path:
    """A hidden name in the same folder, which no process of any host on the file system has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def replacing(path: Path, /) -> Iterator[Path]:
    """The name of a file to write, which then takes the place of the one at ``path``.

    Whoever reads that sees all of the old one or all of the new. Where the writing fails, the old
    one stays and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unique_beside(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
