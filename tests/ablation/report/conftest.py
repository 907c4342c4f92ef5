"""The configuration of a study, for the texts that are made of one."""

from pathlib import Path
from typing import Any

import pytest

from gradagree_opt.ablation.runs.store import Config, read_config


@pytest.fixture(scope="module")
def config(finished: Path) -> Config:
    return read_config(finished)


def with_study(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"study": config.study.model_copy(update=changes)})
