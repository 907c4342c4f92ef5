import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gradagree_opt import frameworks
from gradagree_opt.frameworks import FRAMEWORKS, Framework, require

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))[
    "project"
]
EXTRAS = PROJECT["optional-dependencies"]
FAKE = Framework("fake_module", "fake-package", ">=2.1", ('pip install "fake-package>=2.1"',), "us")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a package of that version and source into this process's path."""
    monkeypatch.setitem(FRAMEWORKS, "fake-package", FAKE)
    monkeypatch.syspath_prepend(tmp_path)

    def install(version: str, source: str) -> None:
        folder = tmp_path / f"fake_package-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: fake-package\nVersion: {version}\n")
        (tmp_path / "fake_module.py").write_text(source)

    yield install
    sys.modules.pop("fake_module", None)


def test_supported_versions_are_those_of_the_extras() -> None:
    names = EXTRAS.keys() - {"all", "learn2learn"}
    declared = sum((EXTRAS[name] for name in names), PROJECT["dependencies"])
    table = {f.distribution + f.supported for f in FRAMEWORKS.values()} - {"learn2learn==0.2.0"}
    assert table == set(declared)


def test_learn2learn_is_given_what_its_extra_installs() -> None:
    requirements, _ = FRAMEWORKS["learn2learn"].install
    assert set(re.findall('"(.+?)"', requirements)) == set(EXTRAS["learn2learn"])


@pytest.mark.parametrize("name", [name for name in FRAMEWORKS if name != "learn2learn"])
def test_one_command_installs_a_supported_version(name: str) -> None:
    framework = FRAMEWORKS[name]
    (requirement,) = re.findall('^pip install "(.+)"$', framework.install_command())
    assert Requirement(requirement).name == framework.distribution
    assert Requirement(requirement).specifier == SpecifierSet(framework.supported)


@pytest.mark.parametrize("supported", [">=2.1", ">=2.0", ">=0.7.3", "==0.2.0", ">=2"])
@pytest.mark.parametrize(
    "version",
    ["0.2.0", "0.2", "0.2.1", "0.7.3", "0.7.10", "0.8", "2.0.0", "2.0.9", "2.1", "2.14.1+cu130"],
)
def test_versions_compare_as_pip_compares_them(supported: str, version: str) -> None:
    framework = FAKE._replace(supported=supported)
    assert framework.supports(version) == SpecifierSet(supported).contains(version)


def test_require_gives_the_module(fake) -> None:
    fake("2.1.0", "answer = 42")
    assert require("fake-package").answer == 42


def test_a_missing_framework_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FRAMEWORKS, "fake-package", FAKE)
    with pytest.raises(ImportError) as raised:
        require("fake-package")
    assert str(raised.value) == (
        'expected fake-package>=2.1, found none; install it with: pip install "fake-package>=2.1"'
    )


def test_an_unsupported_version_is_named_without_an_import(fake) -> None:
    fake("1.9", "raise AssertionError")
    with pytest.raises(ImportError, match=r"found 1\.9; install it with: pip install"):
        require("fake-package")


@pytest.mark.parametrize(
    ("source", "reason", "options"),
    [
        ("import module_that_is_not_there", "No module named 'module_that_is_not_there'", ""),
        (
            "raise RuntimeError('operator missing')",
            "RuntimeError: operator missing",
            "--force-reinstall --no-cache-dir --no-deps ",  # what is there already pip lets be
        ),
    ],
)
def test_a_broken_import_is_told_from_a_missing_framework(
    fake, source: str, reason: str, options: str
) -> None:
    fake("2.1", source)
    with pytest.raises(ImportError, match=re.escape(reason)) as raised:
        require("fake-package")
    assert "found one whose import fails" in str(raised.value)
    assert str(raised.value).endswith(f'mend it with: pip install {options}"fake-package>=2.1"')


@pytest.mark.parametrize("name", ["higher", "learn2learn", "lightning", "torchjd", "torchopt"])
def test_an_adapter_without_its_framework_names_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its framework's own dependencies are missing too, as in an environment of PyTorch."""
    for missing in (name, "numpy"):
        monkeypatch.setitem(sys.modules, missing, None)
    for ours in (f"adapters.{name}", "tasks.tasksets"):
        monkeypatch.delitem(sys.modules, f"gradagree_opt.{ours}", raising=False)
    with pytest.raises(ImportError) as raised:
        __import__(f"gradagree_opt.adapters.{name}")
    command = FRAMEWORKS[name].install_command()
    assert str(raised.value).endswith(f"found none; install it with: {command}")


def test_a_reinstallation_leaves_the_dependencies_alone() -> None:
    reason = "ImportError: undefined symbol"
    assert FRAMEWORKS["learn2learn"].mend_command(reason) == (
        "pip install --force-reinstall --no-cache-dir --no-deps "
        "-C--build-option=build_ext learn2learn==0.2.0"
    )
    assert all("--no-deps" in f.mend_command(reason) for f in frameworks.FRAMEWORKS.values())
