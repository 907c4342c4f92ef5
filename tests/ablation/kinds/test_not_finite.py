"""Tasks and losses that are not finite before anything is trained: no method has diverged then."""

import sys
from pathlib import Path

import pytest
import torch

from gradagree_opt.ablation.section import StudyError
from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.training.problem import build_problem
from gradagree_opt.ablation.training.run import Run, RunRecord
from gradagree_opt.ablation.training.training import train_runs
from gradagree_testing.command import contents, gradagree

from ..conftest import WriteStudy

MODULE = """
import torch
from torch import nn
from gradagree_opt.tasks import Sine

class Spoilt:
    '''Sines of which some numbers are others, where all of the conditions hold.'''
    def __init__(self, support_shots, query_shots, where, value, share=1.0, seed=None):
        self.sines = Sine(support_shots=support_shots, query_shots=query_shots)
        self.where, self.value, self.share, self.seed = where, float(value), share, seed

    def sample(self, n_tasks, *, split="train", generator):
        first = generator.initial_seed()
        tasks = self.sines.sample(n_tasks, split=split, generator=generator)
        named, part, name = self.where.split()
        if split == named and self.seed in (None, str(first)):
            bad = torch.rand(n_tasks, generator=torch.Generator().manual_seed(1)) < self.share
            tasks[part][name == "targets"][bad, -1] = self.value
        return tasks

class Broken:
    '''Draws one task at a time, and no more.'''
    def __init__(self, support_shots, query_shots):
        self.sines = Sine(support_shots=support_shots, query_shots=query_shots)
    def sample(self, n_tasks, *, split="train", generator):
        if n_tasks > 8 and split == "test":
            raise LookupError("the server\\nis down")
        return self.sines.sample(n_tasks, split=split, generator=generator)

class Log(nn.Linear):
    def forward(self, x):
        return super().forward(x).log()

def log(inputs, outputs):
    return Log(inputs, outputs)
"""
PLACES = [
    f"{split} {part} {name}"
    for split in ("train", "validation", "test")
    for part in ("support", "query")
    for name in ("inputs", "targets")
]


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spoilt.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "spoilt", raising=False)


def own(**options: object) -> dict[str, object]:
    shots = {"support_shots": 10, "query_shots": 3}
    return {"kind": "own", "make": "spoilt:Spoilt", "options": options, **shots}


def refusal(study: Path) -> str:
    """The one sentence with which it is refused; nothing is written."""
    before = contents(study.parent)
    result = gradagree("ablate", study, "--out", "out", "--jobs", 1)
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    after = {name: found for name, found in contents(study.parent).items() if ".pyc" not in name}
    assert after == before and "\n" not in message
    return message


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("value", "share"), [("nan", 1.0), ("-inf", 0.2)])
def test_tasks_of_ones_own_that_are_not_finite_are_named_before_anything_is_trained(
    write_study: WriteStudy, where: str, value: str, share: float
) -> None:
    form = {"kind": "maml"} if where.startswith("train query") else {"kind": "reptile"}
    inner = {"lr": 0.02, "steps": 2}
    message = refusal(
        write_study(tasks=own(where=where, value=value, share=share), form=form, inner=inner)
    )
    split, part, name = where.split()
    assert f"the {part} {name} of {split} tasks: expected finite numbers, found {value}" in message


def test_a_task_that_cannot_be_drawn_with_others_is_said_so(write_study: WriteStudy) -> None:
    tasks = own() | {"make": "spoilt:Broken"}
    message = refusal(write_study(tasks=tasks))
    assert "12 test tasks cannot be drawn: LookupError: the server" in message


@pytest.mark.usefixtures("without_figures")
def test_tasks_of_a_later_seed_that_are_not_finite_end_the_study_and_no_method_diverges(
    write_study: WriteStudy,
) -> None:
    from gradagree_opt.ablation.training.networks import derived_seed

    seed = str(derived_seed(5, "test"))  # rates are chosen on seed 3
    tasks = own(where="test query targets", value="nan", share=0.2, seed=seed)
    result = gradagree("ablate", write_study(tasks=tasks), "--out", "out", "--jobs", 1)
    assert result.exit_code == 1
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("gradagree: the query targets of test tasks: expected finite")
    assert sentence.endswith("; the finished runs are in out")
    records = [
        RunRecord.model_validate_json(p.read_bytes()) for p in Path("out/runs").glob("*.js*")
    ]
    assert len(records) == 6 and {record.run.seed for record in records} == {3}
    assert all(torch.tensor([*record.test.values()]).isfinite().all() for record in records)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"kind": "own", "make": "spoilt:log"}}, "after 1 gradient step, found nan"),
        (
            {"tasks": own(where="validation query targets", value="1e25")},
            "after 1 gradient step, found inf",
        ),
    ],
)
def test_a_loss_that_is_not_finite_before_training_is_not_a_methods(
    write_study: WriteStudy, changes: dict[str, object], words: str
) -> None:
    message = refusal(write_study(**changes))
    assert "the validation tasks of seed 3: expected a finite loss of the untrained" in message
    assert words in message


def test_an_inner_rate_that_no_untrained_network_stands_is_not_a_methods_divergence(
    write_study: WriteStudy,
) -> None:
    inner = {"lr": 1e30, "steps": 2}
    study = load(str(write_study(inner=inner)))
    run = Run(method=study.methods[0], rate=0.25, seed=3)
    with pytest.raises(StudyError, match="take a smaller inner lr"):
        train_runs(study, build_problem(study, None), [run], lambda _: None)


def test_a_corruption_that_overflows_is_named(write_study: WriteStudy) -> None:
    corruption = {"kind": "outlier_scale", "fraction": 1.0, "scale": 3.4e38}
    message = refusal(write_study(corruption=corruption))
    assert "targets of train tasks: expected finite numbers, found " in message
