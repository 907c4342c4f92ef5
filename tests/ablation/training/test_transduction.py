"""Query examples predicted together or apart, against a plain loop over single ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradagree_opt.ablation.study.loading import load
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training import networks as models
from gradagree_opt.ablation.training.networks import (
    Params,
    accuracy,
    conv4,
    mlp,
    predict,
    predict_apart,
)
from gradagree_opt.ablation.training.problem import (
    Problem,
    Tasks,
    build_problem,
    query_outputs,
    scores_after,
)

from ..conftest import WriteStudy

WAY = 3


def drawings(tasks: int, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(tasks, examples, 1, 28, 28, generator=generator)
    return x, (torch.arange(examples) % WAY).expand(tasks, -1)


@pytest.fixture(params=["nichol", "finn", "mlp"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "mlp":
        return mlp([28 * 28, 8, 4, WAY], nn.ReLU, batch_norm=True)
    return conv4(4, WAY, request.param)


def params_of(module: nn.Module, tasks: int) -> Params:
    """Other parameters for every task, so that no task can do for another."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: leaf.detach() + 0.1 * torch.randn(tasks, *leaf.shape, generator=generator)
        for name, leaf in module.named_parameters()
    }


def problem_of(study: Study, module: nn.Module) -> Problem:
    return replace(
        build_problem(study, None),
        module=module,
        loss=functional.cross_entropy,
        score=accuracy,
        transductive=False,
    )


def by_hand(module: nn.Module, params: Params, tasks: Tasks) -> Tensor:
    """Each query example alone behind its support set, one after the other, in float64."""
    (support, _), (query, _) = tasks["support"], tasks["query"]
    outputs = []
    for task in range(len(support)):
        own = {name: leaf[task].double() for name, leaf in params.items()}
        for example in query[task]:
            batch = torch.stack([*support[task], example]).double()
            outputs.append(predict(module, own, batch)[len(support[task])])
    return torch.stack(outputs).unflatten(0, (len(support), -1))


@pytest.mark.parametrize("inputs_at_once", [2**22, 784 * 7 * 9, 784 * 7 * 2, 1])
def test_apart_is_the_plain_loop_over_single_query_examples_however_many_at_once(
    study: Study, network: nn.Module, monkeypatch: pytest.MonkeyPatch, inputs_at_once: int
) -> None:
    monkeypatch.setattr(models, "INPUTS_AT_ONCE", inputs_at_once)
    tasks = {"support": drawings(5, 6, 2), "query": drawings(5, 4, 3)}
    params = params_of(network, 5)
    found = query_outputs(problem_of(study, network), params, tasks)
    torch.testing.assert_close(
        found.double(), by_hand(network, params, tasks), rtol=1e-4, atol=1e-5
    )


def test_the_scores_of_a_test_are_those_of_the_plain_loop(study: Study, network: nn.Module) -> None:
    tasks = {"support": drawings(5, 6, 2), "query": drawings(5, 4, 3)}
    params = {name: leaf[0] for name, leaf in params_of(network, 1).items()}
    problem = problem_of(study, network)
    expanded = {name: leaf.expand(5, *leaf.shape) for name, leaf in params.items()}
    outputs = by_hand(network, expanded, tasks)
    for measure in (problem.loss, problem.score):
        found = scores_after(problem, measure, params, tasks, [0])[0]
        for task in range(5):
            expected = measure(outputs[task], tasks["query"][1][task]).item()
            assert found[task].item() == pytest.approx(expected, rel=1e-4)


def test_only_together_do_the_other_query_examples_change_a_prediction(network: nn.Module) -> None:
    params = {name: leaf[0] for name, leaf in params_of(network, 1).items()}
    (support, _), (query, _) = ((x[0], y[0]) for x, y in (drawings(1, 6, 2), drawings(1, 4, 3)))
    others = query.clone()
    others[1:] = 5 * drawings(1, 3, 4)[0][0]
    apart = [predict_apart(network, params, support, part) for part in (query, others)]
    assert torch.equal(apart[0][0], apart[1][0])
    assert not torch.equal(apart[0][1], apart[1][1])
    together = [predict(network, params, part) for part in (query, others)]
    assert not torch.allclose(together[0][0], together[1][0])


def test_without_batch_norm_both_are_one(study: Study) -> None:
    problem = build_problem(study, None)
    tasks = problem.evaluation.sample(4, generator=torch.Generator().manual_seed(0))
    params = params_of(problem.module, 4)
    together = query_outputs(problem, params, tasks)
    apart = query_outputs(replace(problem, transductive=False), params, tasks)
    torch.testing.assert_close(together, apart)


def test_a_study_says_which(write_study: WriteStudy, study: Study) -> None:
    test = study.test.model_dump() | {"transductive": False}
    apart = load(str(write_study(test=test)))
    assert (build_problem(study, None).transductive, build_problem(apart, None).transductive) == (
        True,
        False,
    )
