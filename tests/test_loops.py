import difflib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from gradagree_opt.frameworks import FRAMEWORKS

ROOT = Path(__file__).parents[1]
LOOPS = ROOT / "docs" / "loops"
PAIRS = sorted(path.stem.removesuffix("_before") for path in LOOPS.glob("*_before.py"))
OMNIGLOT = Path(
    os.environ.get("GRADAGREE_OMNIGLOT", ROOT.parent / "shared" / "data" / "omniglot28.npz")
)
ITERATIONS = 40

LINES = {"ranks": 5}
"""Where a pair takes more than three: processes meet and part."""
PAGES = {"ranks": ROOT / "docs" / "scaling.md"}

each_pair = pytest.mark.parametrize("pair", PAIRS)


def lines(pair: str, side: str) -> list[str]:
    return (LOOPS / f"{pair}_{side}.py").read_text(encoding="utf-8").splitlines()


def changes(pair: str) -> list[str]:
    """Lines that the change to Gradient Agreement removes and adds, empty ones apart."""
    diff = difflib.unified_diff(lines(pair, "before"), lines(pair, "after"), lineterm="", n=0)
    return [line for line in list(diff)[2:] if line[0] in "+-" and line[1:].strip()]


def in_order(some: Iterable[str], of: Iterable[str]) -> bool:
    rest = iter(of)
    return all(line in rest for line in some)


def is_the_diff(block: str, pair: str) -> bool:
    """Whether a diff has exactly the pair's changes, and between them lines of both files."""
    shown = [line for line in block.splitlines() if line[1:].strip()]
    kept = {sign: [line[1:] for line in shown if line[0] in f" {sign}"] for sign in "+-"}
    return (
        [line for line in shown if line[0] != " "] == changes(pair)
        and in_order(kept["-"], lines(pair, "before"))
        and in_order(kept["+"], lines(pair, "after"))
    )


def loaded(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"loops_{name}", LOOPS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_loop_has_a_before_and_an_after() -> None:
    names = {path.stem for path in LOOPS.glob("*.py")}
    assert names == {f"{pair}_{side}" for pair in PAIRS for side in ("before", "after")}


def test_every_adapter_has_a_pair() -> None:
    modules = {path.stem for path in (ROOT / "adapters").glob("*.py")} - {"__init__"}
    adapters = {module.split("_")[0] for module in modules}  # a framework may have several
    assert adapters <= {pair.split("_")[0] for pair in PAIRS}


@each_pair
def test_three_lines_bring_gradient_agreement_in(pair: str) -> None:
    signs = [line[0] for line in changes(pair)]
    most = LINES.get(pair, 3)
    assert 0 < max(signs.count("+"), signs.count("-")) <= most, "\n".join(changes(pair))


@each_pair
def test_the_page_of_the_adapter_shows_the_diff(pair: str) -> None:
    own = ROOT / "docs" / "adapters" / f"{pair.split('_')[0]}.md"
    page = PAGES.get(pair, own)
    blocks = re.findall(r"```diff\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert any(is_the_diff(block, pair) for block in blocks), "\n".join(changes(pair))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # what a framework warns of is tested with its adapter
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair != "ranks"])  # see tests/ranks
def test_the_loop_learns(pair: str, side: str) -> None:
    name = pair.split("_")[0]
    framework = FRAMEWORKS.get("lightning" if name == "fabric" else name)
    if framework is not None and framework.installed_version() is None:
        pytest.skip(f"{framework.distribution} is not installed")
    if pair.endswith("_ddp"):
        losses = of_processes(f"{pair}_{side}")
        check_learned(losses)
        return
    main = loaded(f"{pair}_{side}").main
    if "data" not in inspect.signature(main).parameters:
        losses = main(ITERATIONS)
    elif OMNIGLOT.exists():
        losses = main(ITERATIONS, data=str(OMNIGLOT))
    else:
        pytest.skip(f"no Omniglot at {OMNIGLOT}; name its place in GRADAGREE_OMNIGLOT")
    check_learned(losses)


def of_processes(name: str) -> list[float]:
    """Losses of a script that starts itself again for every device."""
    command = [sys.executable, str(LOOPS / f"{name}.py"), str(ITERATIONS)]
    # Lightning leaves these in a process that has trained: a script would take itself for a rank.
    of_ranks = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    env = {name: value for name, value in os.environ.items() if name not in of_ranks}
    run = subprocess.run(command, capture_output=True, text=True, cwd=LOOPS, env=env, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return [float(line) for line in run.stdout.split() if line[0].isdigit()]


def check_learned(losses: list[float]) -> None:
    quarter = ITERATIONS // 4
    assert len(losses) == ITERATIONS
    assert sum(losses[-quarter:]) < sum(losses[:quarter])
