"""One study begun twice in one folder at once, with other seeds: its files tell of one of them."""

import shutil
import sys
import threading
from itertools import permutations
from pathlib import Path

import pytest

from gradagree_opt.ablation.conduct import prepare
from gradagree_opt.ablation.runs.store import CONFIG, one_writer, read_config
from gradagree_opt.ablation.study.loading import load
from gradagree_testing.command import contents, gradagree

from ..conftest import WriteStudy


def ignore(_: object) -> None:
    pass


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("order", [*permutations(["few", "many", "short"])])
def test_the_configuration_is_of_the_last_that_ended_and_so_are_the_tables(
    write_study: WriteStudy, tmp_path: Path, order: tuple[str, ...]
) -> None:
    methods = [{"name": name, "aggregator": name} for name in ("mean", "gradient_agreement")]
    outer = {"optimizer": "sgd", "rates": [0.5]}
    out, path = tmp_path / "out", str(write_study(methods=methods, outer=outer))
    studies = {
        "few": load(path, seeds=[3]),
        "many": load(path, seeds=[3, 5]),
        "short": load(path, seeds=[3], iterations=3),
    }
    begun = {name: prepare(study, out, None, [name], ignore) for name, study in studies.items()}
    for name in order:
        begun[name].run(1, ignore)
        config = read_config(out)
        assert (config.command, config.study) == ([name], studies[name])
    before = contents(out)
    assert gradagree("report", out).exit_code == 0
    assert contents(out) == before


@pytest.mark.usefixtures("without_figures")
def test_a_report_leaves_the_configuration_of_an_earlier_release_as_it_is(tmp_path: Path) -> None:
    recorded = Path(__file__).parents[3] / "docs/results/equal-sine"  # which has fewer keys
    out = tmp_path / "out"
    shutil.copytree(recorded, out)
    assert gradagree("report", out).exit_code == 0
    assert (out / CONFIG).read_bytes() == (recorded / CONFIG).read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_of_two_that_end_at_once_one_waits_for_the_other(tmp_path: Path) -> None:
    inside, second = threading.Event(), threading.Event()

    def write() -> None:
        inside.set()
        with one_writer(tmp_path):
            second.set()

    with one_writer(tmp_path):
        thread = threading.Thread(target=write)
        thread.start()
        assert inside.wait(10) and not second.wait(0.2)
    thread.join(10)
    assert second.is_set()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_written_to_all_the_same(tmp_path: Path) -> None:
    with one_writer(tmp_path / "absent"):
        pass
