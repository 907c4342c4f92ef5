"""Steps of a study that a GPU takes by a captured graph, and those that it cannot."""

from collections.abc import Callable

import pytest
import torch

from gradagree_opt.ablation.study.methods import Method
from gradagree_opt.ablation.study.sections import MAMLForm
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training import program as program_module
from gradagree_opt.ablation.training.captured import NotCapturedError
from gradagree_opt.ablation.training.networks import initial_params
from gradagree_opt.ablation.training.problem import build_problem
from gradagree_testing.devices import needs_gpu, train_group

from .conftest import EQUAL, METHODS, runs_of


@needs_gpu
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", ["reptile", "maml"])
@pytest.mark.parametrize("name", METHODS)
def test_a_captured_step_does_what_its_operations_do_one_by_one(
    study: Study, monkeypatch: pytest.MonkeyPatch, name: str, form: str, count: int
) -> None:
    study = study.model_copy(update={"iterations": 130})
    if form == "maml":
        study = study.model_copy(update={"form": MAMLForm(kind="maml")})
    problem = build_problem(study, None, torch.device("cuda"))
    runs = runs_of(METHODS[name], (0.01, 3), (0.02, 5), (0.04, 3))[:count]
    found = train_group(study, problem, runs)
    asked: list[object] = []

    def one_by_one(function: Callable[[], None], _: object) -> Callable[[], None]:
        asked.append(function)
        return function

    monkeypatch.setattr(program_module, "captured", one_by_one)
    expected = train_group(study, problem, runs)
    assert len(asked) == 2
    for (record, params), (other, others) in zip(found, expected, strict=True):
        torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-6)
        assert record.validation == pytest.approx(other.validation, rel=1e-4)


@needs_gpu
def test_a_step_that_waits_for_the_device_is_done_one_by_one_after_one_sentence(
    study: Study,
) -> None:
    method = Method(name="power", aggregator="gramian_power", options={"power": 0.5})
    runs = runs_of(method, (0.1, 3), (0.2, 5))
    told: list[str] = []
    problem = build_problem(study, None, torch.device("cuda"))
    found = train_group(study, problem, runs, tell=told.append)
    [sentence] = told
    assert sentence.startswith("the outer steps of 'power' cannot be one CUDA graph")
    expected = train_group(study, build_problem(study, None), runs)
    for (_, params), (_, others) in zip(found, expected, strict=True):
        torch.testing.assert_close(params, others, rtol=1e-3, atol=1e-5)


def test_diagnostics_are_read_of_the_last_step_alone(study: Study) -> None:
    problem, runs = build_problem(study, None), runs_of(EQUAL, (0.5, 3))
    program = program_module.Program(study, problem, runs, [initial_params(study, 3)], print)
    program.load()
    program.make_steps()
    taken: list[bool] = []
    program._steps = {True: lambda: taken.append(True), False: lambda: taken.append(False)}
    program.do_steps(4)
    assert taken == [False, False, False, True]


def test_the_sentence_of_a_step_that_cannot_be_captured_names_the_method_and_the_reason(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Callable[[], None]:
        raise NotCapturedError("it waits")

    monkeypatch.setattr(program_module, "captured", refuse)
    told: list[str] = []
    problem, runs = build_problem(study, None), runs_of(EQUAL, (0.5, 3))
    program = program_module.Program(study, problem, runs, [initial_params(study, 3)], told.append)
    program.load()
    program.device = torch.device("cuda")  # for the choice alone: its tensors are on the CPU
    program.make_steps()
    [sentence] = told
    assert "'equal'" in sentence and sentence.endswith("it waits") and "\n" not in sentence
