"""Which runs are trained together, and whether they are compiled: decided without a clock."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from hypothesis import given
from hypothesis import strategies as st

from gradagree_opt.ablation.runs import job as job_module
from gradagree_opt.ablation.runs.sweep import Sweep, compiles, tuning_runs
from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.grouping import group_size, groups, is_compiled
from gradagree_opt.ablation.training.networks import build_module
from gradagree_opt.ablation.training.problem import Problem, build_problem
from gradagree_opt.ablation.training.run import Run
from gradagree_testing.command import gradagree

METHODS = load("sine").methods


@given(counts=st.lists(st.integers(1, 20), max_size=4), largest=st.integers(1, 9))
def test_groups_are_of_one_method_of_even_size_and_leave_no_run_out(
    counts: list[int], largest: int
) -> None:
    runs = [
        Run(method=METHODS[index], rate=1.0, seed=seed)
        for seed in range(20)
        for index, count in enumerate(counts)
        if seed < count
    ]
    found = groups(runs, largest)
    assert sorted(run.label for group in found for run in group) == sorted(r.label for r in runs)
    for index, count in enumerate(counts):
        sizes = [len(group) for group in found if group[0].method == METHODS[index]]
        assert max(sizes) <= largest and max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-count // largest)
    assert all(run.method == group[0].method for group in found for run in group)


def test_the_methods_take_turns(study: Study) -> None:
    runs = [Run(method=m, rate=1.0, seed=seed) for m in study.methods for seed in range(5)]
    runs += [Run(method=study.methods[1], rate=0.5, seed=0)]
    found = [group[0].method for group in groups(runs, 3)]
    assert found == [*study.methods, *study.methods]
    assert [len(group) for group in groups(runs, 3)] == [2, 3, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("name", "size"), [("sine", 6), ("sine-maml", 5), ("omniglot-5way-1shot", 1)]
)
def test_small_networks_are_trained_together_and_convolutional_ones_alone(
    name: str, size: int
) -> None:
    study = load(name)
    assert group_size(study, build_module(study)) == size


def test_a_group_is_never_larger_than_eight_nor_empty(study: Study) -> None:
    assert group_size(study, build_module(study)) == 8
    wide = study.model_copy(
        update={"model": study.model.model_copy(update={"hidden": [4096, 512]})}
    )
    assert group_size(wide, build_module(wide)) == 1


@pytest.mark.parametrize(("iterations", "pays"), [(450, False), (1999, False), (2000, True)])
def test_a_study_compiles_by_itself_when_it_is_long_enough(
    study: Study, iterations: int, pays: bool
) -> None:
    assert study.compile == "auto"
    assert is_compiled(study.model_copy(update={"iterations": iterations})) is pays


@pytest.mark.parametrize("asked", [True, False])
def test_a_study_that_says_whether_to_compile_is_obeyed(study: Study, asked: bool) -> None:
    for iterations in (1, 10**6):
        changes = {"compile": asked, "iterations": iterations}
        assert is_compiled(study.model_copy(update=changes)) is asked


@pytest.fixture(params=["absent", "failing"])
def no_compiler(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """torch.compile without a compiler, or with one that knows its version and nothing else."""
    # Imported at its first compilation, it warns of CUDA's tools where there is no GPU.
    importlib.import_module("torch.utils.cpp_extension")
    path = tmp_path / "compiler"
    if request.param == "failing":
        version = '[ "$1" = --version ] && exec g++ --version'
        path.write_text(f"#!/bin/sh\n{version}\necho 'error: no Python.h'\nexit 1\n")
        path.chmod(0o700)
    with torch._inductor.config.patch({"cpp.cxx": (str(path),)}):
        yield "none" if request.param == "absent" else "one that fails (error: no Python.h)"


@pytest.mark.compiles
def test_without_a_compiler_a_study_goes_on_uncompiled_after_one_sentence(
    study: Study, no_compiler: str
) -> None:
    warnings: list[str] = []
    long = study.model_copy(update={"iterations": 10**6})
    assert not compiles(long, warnings.append)
    [sentence] = warnings
    assert f"found {no_compiler}; the study goes on without" in sentence and "\n" not in sentence


@pytest.mark.usefixtures("no_compiler")
def test_a_study_that_does_not_compile_needs_no_compiler(study: Study) -> None:
    warnings: list[str] = []
    for changes in ({"iterations": 1999}, {"iterations": 10**6, "compile": False}):
        assert not compiles(study.model_copy(update=changes), warnings.append)
    assert warnings == []


@pytest.mark.compiles
def test_without_a_compiler_a_study_that_wants_one_is_refused_before_anything_is_written(
    write_study: Callable[..., Path], tmp_path: Path, no_compiler: str
) -> None:
    corruption = {"kind": "shuffled_labels", "fraction": [0, 0.5]}
    study = write_study(compile=True, corruption=corruption)
    result = gradagree("ablate", study, "--out", tmp_path / "out", "--jobs", 1)
    assert result.exit_code == 2
    assert f"needs a C++ compiler, found {no_compiler}; install one" in result.stderr
    assert result.stderr.startswith("gradagree: compile: true") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.compiled
def test_with_a_compiler_both_are_compiled(study: Study) -> None:
    for changes in ({"iterations": 10**6}, {"compile": True}):
        assert compiles(study.model_copy(update=changes), pytest.fail)


@pytest.mark.compiles
def test_the_workers_do_as_the_parent_has_decided_under_the_keys_of_the_study(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study.model_copy(update={"compile": True})
    asked: list[bool] = []

    def seen(decided: Study, data: Path | None, *device: torch.device) -> Problem:
        asked.append(decided.compile is True)
        return build_problem(decided.model_copy(update={"compile": False}), data, *device)

    monkeypatch.setattr(job_module, "build_problem", seen)
    for compiled in (True, False):
        sweep = Sweep(study, tmp_path / str(compiled), None, print)
        sweep.compiled = compiled
        asked.clear()
        sweep.complete(tuning_runs(study)[:1], 1, lambda _: None)
        assert asked == [compiled]
    found = [sorted(path.name for path in tmp_path.glob(f"{way}/runs/*")) for way in (True, False)]
    assert found[0] == found[1] and tuning_runs(study)[0].key(study, None) in found[0][0]


def test_another_word_about_compilation_is_refused(write_study: Callable[..., Path]) -> None:
    with pytest.raises(StudyError, match="in 'compile': expected 'auto', True or False"):
        load(str(write_study(compile="maybe")))
