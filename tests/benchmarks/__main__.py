"""Runs the benchmarks: ``python -m benchmarks [CASE …] [--out FOLDER]`` in ``tests/``.

Every case has a process of its own, and so has every peak of memory. Cases that are not run are
left in the folder as they are, with the machine that they ran on.
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
from .timing import Case, compare, peak_memory, ratio, take_turns, timing

CASES = ("sine_maml", "omniglot_maml", "aggregation", "matrix_free", "growth", "study")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none")
    parser.add_argument("--out", type=Path, help="folder that benchmarks.md and .json go to")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # "case" or a contestant, in a child
    options = parser.parse_args()
    names = options.cases or CASES
    for name in names:
        if name not in CASES:
            parser.error(f"expected one of {', '.join(CASES)}, found {name!r}")
    if options.only:
        print(json.dumps(part(names[0], options.only)))
        return
    results = {}
    for name in names:
        results[name] = child(name, "case")
        for contestant in results[name].get("memory", {}):
            results[name]["memory"][contestant] = child(name, contestant)
        results[name]["machine"] = report.machine()
        print(report.section(name, results[name]), flush=True)
    if options.out:
        path = options.out / "benchmarks.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        cases = {name: (kept | results)[name] for name in CASES if name in kept | results}
        path.write_text(json.dumps(cases, indent=1) + "\n")
        (options.out / "benchmarks.md").write_text(report.page(cases))


def child(name: str, only: str) -> Any:
    """What a fresh process finds; its warnings go to this one's stderr."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", name, "--only", only]
    # What is freed goes back at once, or the peak would be the allocator's.
    settings = {} if only == "case" else {"MALLOC_MMAP_THRESHOLD_": "131072"}
    environment = os.environ | settings
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def part(name: str, only: str) -> Any:
    module = importlib.import_module(f"benchmarks.case_{name}")
    if not hasattr(module, "case"):  # has no contestants
        return {"title": module.TITLE, name: module.measure()}
    case: Case = module.case()
    if only == "case":
        return timed(case)
    contestant = next(each for each in case.contestants if each.name == only)
    return peak_memory(contestant.make())


def timed(case: Case) -> dict[str, Any]:
    steps = {contestant.name: contestant.make() for contestant in case.contestants}
    compare(case, steps)
    times = take_turns(steps, case.rounds)
    return {
        "title": case.title,
        "seconds": {name: asdict(timing(each)) for name, each in times.items()},
        "memory": dict.fromkeys(steps),
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
