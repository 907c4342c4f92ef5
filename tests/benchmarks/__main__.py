"""Runs the benchmarks: ``python -m benchmarks [CASE …] [--out FOLDER] [--device D]`` in ``tests/``.

Every case has a process of its own, and so has every peak of memory of a CPU. Cases that are not
run are left in the folder as they are, with the machine that they ran on.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import report
from .timing import (
    Case,
    Step,
    compare,
    device,
    peak_memory,
    peak_on_device,
    ratio,
    take_turns,
    timing,
    use_device,
)

ON_DEVICES = (
    *("sine_maml", "omniglot_maml", "aggregation", "equal_agreement"),
    *("matrix_free", "multi_task"),
)
CASES = (*ON_DEVICES, "growth", "study")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none")
    parser.add_argument("--out", type=Path, help="folder that benchmarks.md and .json go to")
    parser.add_argument("--device", default="cpu", help="cuda writes benchmarks-cuda.md and .json")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # "case" or a contestant, in a child
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)  # before hours of measuring
    known = CASES if options.device == "cpu" else ON_DEVICES
    names = options.cases or known
    for name in names:
        if name not in known:
            parser.error(f"expected one of {', '.join(known)}, found {name!r}")
    use_device(options.device)
    if options.only:
        print(json.dumps(part(names[0], options.only)))
        return
    results = {}
    for name in names:
        results[name] = child(name, "case", options.device)
        memory = results[name].get("memory", {})
        for contestant in memory if options.device == "cpu" else ():
            memory[contestant] = child(name, contestant, options.device)
        results[name]["machine"] = report.machine()
        print(
            report.section(name, results[name]), *report.missed(results[name]), sep="\n", flush=True
        )
        if options.out:
            suffix = "" if options.device == "cpu" else f"-{options.device}"
            keep(results, options.out / f"benchmarks{suffix}.json")


def keep(results: dict[str, Any], path: Path) -> None:
    """Writes the results beside those of other cases, and the page of all."""
    known = (json.loads(path.read_text()) if path.exists() else {}) | results
    cases = {name: known[name] for name in CASES if name in known}
    path.write_text(json.dumps(cases, indent=1) + "\n")
    path.with_suffix(".md").write_text(report.page(cases))


def child(name: str, only: str, device: str) -> Any:
    """What a fresh process finds; its warnings go to this one's stderr."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", name]
    command += ["--only", only, "--device", device]
    # What is freed goes back at once, or the peak would be the allocator's.
    settings = {} if only == "case" else {"MALLOC_MMAP_THRESHOLD_": "131072"}
    settings["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # jax would take a GPU for itself
    environment = os.environ | settings
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def part(name: str, only: str) -> Any:
    module = importlib.import_module(f"benchmarks.case_{name}")
    if not hasattr(module, "case"):  # has no contestants
        return {"title": module.TITLE, name: module.measure()}
    with device():  # only here: every call costs more in it
        case: Case = module.case()
        made = [each for each in case.contestants if only in ("case", each.name)]
        steps = {contestant.name: contestant.make() for contestant in made}
    return timed(case, steps) if only == "case" else peak_memory(steps[only])


def timed(case: Case, steps: dict[str, Step]) -> dict[str, Any]:
    compare(case, steps)
    times = take_turns(steps, case.rounds)
    return {
        "title": case.title,
        "seconds": {name: asdict(timing(each)) for name, each in times.items()},
        "memory": {c.name: peak_on_device(c, steps[c.name]) for c in case.contestants},
        "bars": [
            asdict(bar)
            | {"text": str(bar)}
            | (
                {}
                if bar.of_memory
                else {"found": asdict(ratio(times, bar.numerator, bar.denominator))}
            )
            for bar in case.bars
        ],
    }


if __name__ == "__main__":
    main()
