"""A full disk, on a real file system of a few pages, at every stage of a study."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from gradagree_opt.ablation.training.run import RunRecord
from gradagree_opt.tasks import MiniImageNet
from gradagree_testing.command import TIMED, gradagree
from gradagree_testing.photographs import write_photographs

pytestmark = [pytest.mark.slow, pytest.mark.long]
PAGE = 4096


class Disk:
    """A file system in memory, of as many pages as there should be left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.mount("-t", "tmpfs", "none", "-o", f"size={2**26}")

    def mount(self, *arguments: str) -> None:
        subprocess.run(
            ["mount", *arguments, str(self.folder)], check=True, capture_output=True, text=True
        )

    def leave(self, pages: int) -> None:
        used = sum(-(-p.stat().st_size // PAGE) for p in self.folder.rglob("*") if p.is_file())
        # of size 0 it would have no limit
        self.mount("-o", f"remount,size={max(used + pages, 1) * PAGE}")

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        disk = Disk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield disk
    disk.unmount()


def refused(result: Result) -> None:
    """One sentence about the disk, after the title and the progress bars where there are some."""
    assert result.exit_code in (1, 2), result.output
    *shown, sentence = result.stderr.strip().splitlines()
    assert all(" % " in bar for bar in shown[1:]), result.stderr
    assert sentence.startswith("gradagree: "), result.stderr
    assert "No space left on device" in sentence


def records(out: Path) -> dict[str, bytes]:
    """The records, all whole, and nothing beside them but parameters."""
    found = {path.name: path.read_bytes() for path in out.glob("runs/*.json")}
    for content in found.values():
        RunRecord.model_validate_json(content)
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert not [name for name in names if name.startswith(".")]
    return found


@pytest.mark.usefixtures("without_pictures")
def test_a_disk_that_is_full_at_any_stage_loses_nothing_and_the_same_command_goes_on(
    disk: Disk, finished: Path, study_file: Path
) -> None:
    out = disk.folder / "out"
    command = ["ablate", study_file, "--out", out, "--jobs", 1]
    reached = [0]
    # from no room for the configuration, over room for a few records, to none for the artefacts
    for pages in (0, 1, 2, 3, 5, 8, 13):
        disk.leave(pages)
        before = records(out)
        refused(gradagree(*command))
        after = records(out)
        assert before.items() <= after.items()
        reached.append(len(after))
    assert reached[1] == 0 and reached[-1] == 9 and len(set(reached)) > 2, reached
    kept = records(out)
    disk.leave(1000)
    assert gradagree(*command).exit_code == 0
    assert records(out) == kept
    for path in finished.iterdir():
        if path.is_file() and path.name not in {"config.json", *TIMED}:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_report_on_a_full_disk_leaves_the_files_that_are_there(
    disk: Disk, study_file: Path
) -> None:
    out = disk.folder / "out"
    assert gradagree("ablate", study_file, "--out", out, "--jobs", 1).exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    disk.leave(0)
    refused(gradagree("report", out))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    disk.leave(1000)
    assert gradagree("report", out).exit_code == 0


def test_photographs_that_do_not_fit_the_cache_leave_none(disk: Disk, tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "photographs")
    options = {"way": 2, "shot": 1, "query_shots": 2, "cache": disk.folder / "cache"}
    disk.leave(30)  # an image has 21168 bytes
    with pytest.raises(OSError, match="No space left on device"):
        MiniImageNet(root, **options)
    assert not list((disk.folder / "cache").iterdir())
    disk.leave(1000)
    pixels = MiniImageNet(root, **options).images["train"].pixels
    with Image.open(root / "n0/0.jpg") as image:
        expected = np.asarray(image.resize((84, 84), Image.Resampling.LANCZOS))
    assert np.array_equal(pixels[0].numpy(), expected.transpose(2, 0, 1))
