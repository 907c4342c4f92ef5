"""What of the files that are given as ``--data`` goes into the hash of the data."""

import os
from collections.abc import Iterator
from pathlib import Path

READ = 2**30
"""The most bytes of a folder that are read; of a larger one, sizes and times of change count."""
CHUNK = 2**20


def hashed(data: Path) -> Iterator[bytes]:
    """The bytes of a file, or the names and bytes of the files of a folder; of neither, nothing.

    Of a folder with more than a gigabyte: names, sizes and times of change, in seconds. Hidden
    files and those of ``__pycache__`` do not count; links are followed.

    Raises:
        OSError: A file or a folder cannot be read.
    """
    if data.is_file():
        yield from bytes_of(data)
    if not data.is_dir():
        return
    files = [(os.fsencode(path.relative_to(data)), path, path.stat()) for path in files_of(data)]
    small = sum(about.st_size for _, _, about in files) <= READ
    for name, path, about in sorted(files, key=lambda file: file[0]):
        changed = "" if small else int(about.st_mtime)
        yield name + f"\0{about.st_size}\0{changed}\0".encode()
        if small:
            yield from bytes_of(path)


def bytes_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def files_of(folder: Path) -> Iterator[Path]:
    """The files below a folder; links are followed, but in no circle."""

    def fail(error: OSError) -> None:
        raise error

    seen = set[Path]()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(place)
        seen.add(here.resolve())
        folders[:] = sorted(
            name for name in folders if counts(name) and (here / name).resolve() not in seen
        )
        yield from (here / name for name in names if counts(name) and (here / name).is_file())


def counts(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"
