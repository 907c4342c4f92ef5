"""The source distribution has what its tests read: every file of the repository."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = {".ci/run", ".gitignore"}
BUILD = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone: what is tracked is not known")
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="no setuptools")
def test_the_source_distribution_has_every_tracked_file(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    run = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    [archive] = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    assert len(tracked) > 300
    assert tracked - packed == LEFT_OUT
