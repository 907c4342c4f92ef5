import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradagree_opt import doctor
from gradagree_opt.cli import app
from gradagree_opt.doctor import Finding, examine, healthy
from gradagree_opt.frameworks import FRAMEWORKS, Framework

Install = Callable[..., Framework]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package for this process and those that it starts."""
    monkeypatch.syspath_prepend(tmp_path)

    def install_one(name: str, source: str, version: str = "2.1") -> Framework:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        (tmp_path / f"{name}.py").write_text(source)
        return framework(name)

    return install_one


def framework(name: str) -> Framework:
    return Framework(name, name, ">=2.1", (f'pip install "{name}>=2.1"',), "tests")


def test_a_package_that_imports_works(install: Install) -> None:
    found = examine(install("sound", "print('greetings')"))
    assert found == Finding(framework("sound"), "2.1", "works")
    assert found.fix() == ""


def test_a_package_that_is_not_there_is_missing() -> None:
    found = examine(framework("absent"))
    assert found == Finding(framework("absent"), None, "missing")
    assert found.fix() == 'pip install "absent>=2.1"'


def test_an_old_package_is_unsupported_and_not_imported(install: Install, tmp_path: Path) -> None:
    touched = tmp_path / "imported"
    found = examine(install("old", f"open({str(touched)!r}, 'w')", version="2.0.9"))
    assert (found.version, found.status, found.reason) == ("2.0.9", "unsupported", "needs >=2.1")
    assert found.fix() == 'pip install "old>=2.1"'
    assert not touched.exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('operator nms is missing')", "RuntimeError: operator nms is missing"),
        ("import os; os.abort()", "ended by signal 6"),
        ("import os; os._exit(3)", "exit status 3"),
    ],
)
def test_a_package_that_breaks_at_import_is_installed_anew(
    install: Install, source: str, reason: str
) -> None:
    found = examine(install("frail", source))
    assert (found.status, found.reason) == ("broken", reason)
    assert found.fix().startswith("pip install --force-reinstall")


def test_a_package_that_lacks_another_is_given_what_it_needs(install: Install) -> None:
    found = examine(install("lacking", "import module_that_is_not_there"))
    assert found.status == "broken"
    assert "No module named 'module_that_is_not_there'" in found.reason
    assert found.fix() == 'pip install "lacking>=2.1"'


def test_a_package_that_hangs_is_broken(install: Install) -> None:
    found = examine(install("stuck", "import time; time.sleep(60)"), time_limit=1.0)
    assert (found.status, found.reason) == ("broken", "no answer in 1 s")


def test_a_package_that_imports_but_does_not_run_is_broken(install: Install) -> None:
    found = examine(install("hollow", "")._replace(trial="hollow.run()"))
    assert found.status == "broken"
    assert "has no attribute 'run'" in found.reason


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_installed_package_is_found_working(name: str) -> None:
    if FRAMEWORKS[name].installed_version() is None:
        pytest.skip(f"{name} is not installed")
    found = examine(FRAMEWORKS[name])
    assert found.status == "works", found.reason


@pytest.mark.slow
def test_learn2learn_without_torchvision_is_mended_by_its_install_command(tmp_path: Path) -> None:
    if FRAMEWORKS["learn2learn"].installed_version() is None:
        pytest.skip("learn2learn is not installed")
    (tmp_path / "torchvision.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')"
    )
    program = (
        "from gradagree_opt.doctor import examine; from gradagree_opt.frameworks import FRAMEWORKS;"
        "found = examine(FRAMEWORKS['learn2learn']); print(found.status, found.reason, found.fix())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith("broken ModuleNotFoundError: No module named 'torchvision'")
    assert FRAMEWORKS["learn2learn"].install_command() in run.stdout


def test_the_command_prints_every_package_and_each_fix_in_one_line(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " ".join(f"package-{number}" for number in range(20))
    packages = [
        install("sound", ""),
        framework("absent")._replace(install=(f"pip install {long}", "pip install absent")),
    ]
    monkeypatch.setattr(doctor, "FRAMEWORKS", {each.distribution: each for each in packages})
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "80"})
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["sound", "2.1", "works", "tests"] in rows
    assert ["absent", "missing", "tests"] in rows
    fix = f"absent is missing: pip install {long} && pip install absent"
    assert fix in result.stdout.splitlines()
    assert result.exit_code == 0


def test_without_rich_the_same_is_printed_in_plain_lines(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = [install("sound", ""), install("frail", "raise OSError('[no] disk')")]
    monkeypatch.setattr(doctor, "FRAMEWORKS", {each.distribution: each for each in packages})
    monkeypatch.setitem(sys.modules, "rich", None)
    assert doctor.main() == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["sound 2.1 works", "frail 2.1 broken OSError: [no] disk", ""]
    assert printed[3] == f"frail is broken: {examine(packages[1]).fix()}"
    assert len(printed) == 4


def test_a_broken_package_turns_the_exit_status_to_one(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "FRAMEWORKS", {"frail": install("frail", "raise OSError")})
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "frail is broken: pip install --force-reinstall" in result.stdout


@pytest.mark.parametrize(
    ("status", "sound"),
    [("works", True), ("missing", True), ("broken", False), ("unsupported", False)],
)
def test_only_a_missing_option_is_no_illness(status: doctor.Status, sound: bool) -> None:
    assert healthy([Finding(FRAMEWORKS["tensorboard"], None, status)]) == sound
