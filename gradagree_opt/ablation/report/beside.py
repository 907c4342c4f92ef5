"""Finished studies beside each other: their methods on the same tasks, at the same seeds."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gradagree_opt.ablation.report.report import Report, build_report
from gradagree_opt.ablation.runs.store import Config, read_config, read_results
from gradagree_opt.ablation.runs.sweep import Label, Part
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.training.run import RunRecord

SAME = ("tasks", "corruption", "test")
"""What decides on which tasks a seed is trained and tested."""
SHOWN = {"name", "title", "methods", "baseline", "seeds", "quick", "compile", "outer", *SAME}
"""What is the same, in the table, or without an effect on the numbers."""


class Finished(NamedTuple):
    """A study in its folder, by a name that tells it from the others."""

    name: str
    config: Config
    parts: list[Part]

    def keys(self, method: str, seeds: list[int]) -> tuple[str, ...]:
        """What the method's final runs from the seeds are filed under, in all parts."""
        return tuple(
            record.run.key(part.study, self.config.digest(part.study))
            for part in self.parts
            for record in part.final(method)
            if record.run.seed in seeds
        )


def compare_folders(folders: Sequence[Path]) -> Report:
    """The methods of several folders in one table, from the seeds that all of them have.

    Differences are to the baseline of the first. A method whose runs are those of a method before
    it is not there again.

    Raises:
        StudyError: A folder holds no finished study, or their tasks or seeds are not the same.
    """
    names = names_of(folders)
    configs = [read_config(folder) for folder in folders]
    check_same_tasks(names, configs)
    seeds = shared_seeds(names, configs)
    studies = [
        Finished(name, config, read_results(folder, config))
        for name, folder, config in zip(names, folders, configs, strict=True)
    ]
    chosen, same = distinct_methods(studies, seeds)
    report = build_report(
        [merge(studies, chosen, seeds, index) for index in range(len(studies[0].parts))]
    )
    protocol, _, *others = report.notes
    titles = [f"{study.name}: {study.config.study.title}" for study in studies]
    whole = [f"{'; '.join(titles)}.", protocol, *differences(names, configs), *same, *others]
    return replace(report, notes=whole)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or their paths where two of those are the same."""
    whole = [folder.resolve() for folder in folders]
    for folder in folders:
        if whole.count(folder.resolve()) > 1:
            raise StudyError(f"expected different folders, found {folder} twice; give it once")
    short = [folder.name for folder in whole]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def check_same_tasks(names: list[str], configs: list[Config]) -> None:
    """Raises a StudyError unless a seed means the same tasks in all studies."""

    def refuse(what: str, found: list[Any]) -> None:
        told = each_in(found, names)
        raise StudyError(
            f"expected studies of the same tasks, found {what} {told}; scores on other tasks "
            "cannot be compared: run the methods in one study, or on the same tasks"
        )

    for section in SAME:
        for key, found in varied([config.study for config in configs], section).items():
            refuse(key, found)
    steps = [config.study.tuning.steps for config in configs]
    if len(set(steps)) > 1:
        refuse("tuning.steps", steps)
    for name in ("data_sha256", "clean_sha256"):
        digests = [getattr(config, name) for config in configs]
        if len(set(digests)) > 1 and None not in digests:
            refuse(name, digests)


def shared_seeds(names: list[str], configs: list[Config]) -> list[int]:
    """Those that all studies have, in the order of the first."""
    first, *others = (config.study.seeds for config in configs)
    seeds = [seed for seed in first if all(seed in seeds for seeds in others)]
    if not seeds:
        found = each_in([config.study.seeds for config in configs], names)
        raise StudyError(
            f"expected seeds in common, found {found}; run one of the studies from the seeds of "
            "the other (--seeds)"
        )
    return seeds


def distinct_methods(
    studies: list[Finished], seeds: list[int]
) -> tuple[list[list[Method]], list[str]]:
    """Of each study the methods that the ones before it are without; and sentences on the rest."""
    seen: dict[tuple[str, ...], str] = {}
    chosen: list[list[Method]] = []
    same = []
    for study in studies:
        chosen.append([])
        for method in study.config.study.methods:
            label, keys = f"{study.name}: {method.name}", study.keys(method.name, seeds)
            if keys in seen:
                same.append(f'"{label}" has the same runs as "{seen[keys]}".')
                continue
            seen[keys] = label
            chosen[-1].append(method)
    return chosen, same


def merge(
    studies: list[Finished], chosen: list[list[Method]], seeds: list[int], index: int
) -> Part:
    """One part of all studies as that of one, its methods by the names of study and method."""
    methods: list[Method] = []
    records: dict[Label, RunRecord] = {}
    rates = {}
    for study, kept in zip(studies, chosen, strict=True):
        part = study.parts[index]
        for method in kept:
            label = f"{study.name}: {method.name}"
            changes = {"name": label, "rates": part.candidates(method.name)}
            named = method.model_copy(update=changes)
            methods.append(named)
            rates[label] = part.rates[method.name]
            for record in part.final(method.name):
                if record.run.seed in seeds:
                    run = record.run.model_copy(update={"method": named})
                    records[run.label] = record.model_copy(update={"run": run})
    first = studies[0].parts[index].study
    merged = first.model_copy(
        update={
            "title": " beside ".join(study.name for study in studies),
            "methods": methods,
            "seeds": seeds,
            "baseline": f"{studies[0].name}: {first.baseline}",
            "outer": first.outer.model_copy(update={"extend": 0}),
        }
    )
    return Part(merged, records, rates)


def differences(names: list[str], configs: list[Config]) -> list[str]:
    """What else of the studies is not the same, in one sentence."""
    studies = [config.study for config in configs]
    sections = [name for name in type(studies[0]).model_fields if name not in SHOWN]
    found = {key: values for name in sections for key, values in varied(studies, name).items()}
    for key in ("optimizer", "schedule"):
        values = [getattr(study.outer, key) for study in studies]
        found |= {f"outer.{key}": values} if len(set(values)) > 1 else {}
    for package in ("gradagree-opt", "torch", "torchjd"):
        versions = [config.packages.get(package) for config in configs]
        found |= {package: versions} if len(set(versions) - {None}) > 1 else {}
    if not found:
        return []
    told = "; ".join(f"{key} {each_in(values, names, ', ')}" for key, values in found.items())
    return [f"The studies differ in more than their methods: {told}."]


def varied(studies: Sequence[Any], section: str) -> dict[str, list[Any]]:
    """The keys of a section that are not the same in all studies, and what each has there."""
    leaves = [flat(study.model_dump(mode="json")[section], section) for study in studies]
    keys = dict.fromkeys(key for each in leaves for key in each)
    found = {key: [each.get(key) for each in leaves] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def flat(value: Any, name: str) -> dict[str, Any]:
    """The values of nested mappings by their keys, joined by dots."""
    if not isinstance(value, dict):
        return {name: value}
    parts = [flat(part, f"{name}.{key}") for key, part in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def each_in(values: Sequence[Any], names: Sequence[str], between: str = " and ") -> str:
    """The values, each with the name of the study that has it."""
    pairs = zip(values, names, strict=True)
    return between.join(f"{json.dumps(value)} in {name}" for value, name in pairs)
