"""What Ray clusters of the tests' own are started with."""

import shutil
import tempfile
from collections.abc import Iterator

import pytest

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
}


@pytest.fixture(scope="module")
def ray_settings() -> Iterator[None]:
    """Variables of this process, and of those that it starts; the files of clusters are removed."""
    folder = tempfile.mkdtemp(prefix="ray-")  # paths of sockets must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in (SETTINGS | {"RAY_TMPDIR": folder}).items():
            patch.setenv(name, value)
        yield
    shutil.rmtree(folder)
