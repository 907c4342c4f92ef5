"""Which runs are trained together, and whether they are compiled: decided without a clock."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from hypothesis import given
from hypothesis import strategies as st

from gradagree_opt.ablation.grouping import group_size, groups, is_compiled
from gradagree_opt.ablation.loading import load
from gradagree_opt.ablation.models import build_module
from gradagree_opt.ablation.records import Run
from gradagree_opt.ablation.study import Study, StudyError
from gradagree_opt.ablation.sweep import Sweep

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


def test_without_a_compiler_a_study_does_not_compile_by_itself(study: Study) -> None:
    long = study.model_copy(update={"iterations": 10**6})
    assert is_compiled(long)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not is_compiled(long)
        assert is_compiled(long.model_copy(update={"compile": True}))


def test_without_a_compiler_a_study_that_wants_one_is_refused_before_anything_is_written(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    study = load(str(write_study(compile=True)))
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(StudyError, match=r"needs a C\+\+ compiler, found none; install one"),
    ):
        Sweep(study, tmp_path / "out", None, print)
    assert not (tmp_path / "out").exists()
    Sweep(study, tmp_path / "out", None, print)


def test_another_word_about_compilation_is_refused(write_study: Callable[..., Path]) -> None:
    with pytest.raises(StudyError, match="in 'compile': expected 'auto', True or False"):
        load(str(write_study(compile="maybe")))
