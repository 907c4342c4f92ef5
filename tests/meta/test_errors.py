"""What the meta-algorithms refuse, in one sentence each."""

import pytest
import torch

import gradagree_opt as ga

from .loops import ALGORITHMS
from .problems import loss_fn, problem

CASE = problem(n=3)
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
needs_query = pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "Reptile"])


def refuses(algorithm, message, *, loss=loss_fn, tasks=CASE.tasks, params=None, error=ValueError):
    params = CASE.meta(algorithm.learns_rates) if params is None else params
    with pytest.raises(error, match=message) as caught:
        algorithm.build(loss, 0.1, 1).step(params, tasks, ga.GradientAgreement())
    assert "\n" not in str(caught.value)


@each_algorithm
def test_a_loss_with_axes(algorithm):
    def squares(params, batch):
        return (batch[0] @ params["weight1"]) ** 2

    refuses(algorithm, r"to return a scalar tensor, found a tensor of shape \[5, 4\]", loss=squares)


@each_algorithm
def test_a_loss_that_is_no_tensor(algorithm, without_type_checks):
    def shots(params, batch):
        return batch[0].shape[0]

    refuses(algorithm, "to return a scalar tensor, found int", loss=shots)


class Learner(torch.nn.Module):
    """A module that holds no parameter of its own."""

    def forward(self, params, batch):
        return loss_fn(params, batch)


@each_algorithm
def test_the_model_in_place_of_its_loss_and_no_module_that_is_one(algorithm):
    model = torch.nn.Linear(4, 2)
    refuses(algorithm, r"found a module whose .*: Linear; give", loss=model, error=TypeError)
    with pytest.raises(TypeError, match=r"found a module whose .*: Linear; give"):
        ga.aggregate_gradients(model, torch.ones(3), torch.ones(2, 3), ga.Mean())
    params = CASE.meta(algorithm.learns_rates)
    found, expected = (
        algorithm.build(loss, 0.1, 1).step(params, CASE.tasks, ga.Mean()).update
        for loss in (Learner(), loss_fn)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_algorithm
def test_tasks_without_a_support_set(algorithm):
    tasks = {"train": CASE.tasks["support"], "query": CASE.tasks["query"]}
    refuses(
        algorithm, r"expected tasks with a 'support' set, found \['query', 'train'\]", tasks=tasks
    )


@needs_query
def test_tasks_without_a_query_set(name):
    tasks = {"support": CASE.tasks["support"]}
    refuses(
        ALGORITHMS[name], r"expected tasks with a 'query' set, found \['support'\]", tasks=tasks
    )


@each_algorithm
def test_tasks_that_are_no_tensors(algorithm):
    tasks = CASE.tasks | {"query": [leaf.numpy() for leaf in CASE.tasks["query"]]}
    message = r"found ndarray in 'query.0'; give torch\.as_tensor\(…\), with the task axis first$"
    refuses(algorithm, message, tasks=tasks, error=TypeError)


@each_algorithm
def test_a_list_of_tasks(algorithm):
    refuses(algorithm, "expected tasks as .* found list", tasks=CASE.each(), error=TypeError)


@each_algorithm
def test_task_axes_that_differ(algorithm):
    tasks = {"support": CASE.tasks["support"], "query": problem(n=2).tasks["query"]}
    refuses(algorithm, "the same task axis, found 3 in 'support.0' and 2 in 'query.0'", tasks=tasks)


@each_algorithm
def test_an_empty_batch(algorithm):
    refuses(algorithm, "at least one task, found an empty task axis", tasks=problem(n=0).tasks)


@each_algorithm
def test_integer_parameters(algorithm):
    params = CASE.params | {"bias1": torch.arange(4)}
    if algorithm.learns_rates:
        params = {"params": params, "lr": CASE.rates}
    message = r"expected floating-point parameters, found torch.int64 in '(params\.)?bias1'"
    refuses(algorithm, message, params=params, error=TypeError)


@pytest.mark.parametrize("name", ["Meta-SGD", "first-order Meta-SGD"])
@pytest.mark.parametrize(
    ("params", "found"),
    [
        (CASE.params, "'bias1', 'scale2', 'weight1', 'weight2'"),
        ((CASE.params, CASE.rates), "tuple"),
    ],
)
def test_meta_parameters_without_rates(name, params, found):
    refuses(ALGORITHMS[name], f"expected meta-parameters .* found .*{found}", params=params)


def test_grouped_weights_for_meta_sgd():
    meta = ga.MetaSGD(loss_fn, 1)
    with pytest.raises(ValueError, match="scope 'global' for the displacements of Meta-SGD"):
        meta.step(CASE.meta(True), CASE.tasks, ga.GradientAgreement(scope="leaf"))


def test_an_unknown_signal(without_type_checks):
    with pytest.raises(ValueError, match=r"expected signal to be one of .*'gradients'"):
        ga.MAML(loss_fn, ga.InnerSGD(0.1, 1), signal="gradients")


@each_algorithm
def test_an_aggregator_that_was_not_made(algorithm, without_type_checks):
    params = CASE.meta(algorithm.learns_rates)
    with pytest.raises(TypeError, match="found the class GradientAgreement; call it"):
        algorithm.build(loss_fn, 0.1, 1).step(params, CASE.tasks, ga.GradientAgreement)


def test_meta_sgd_adapts_its_own_meta_parameters_only():
    meta = ga.MetaSGD(loss_fn, 1)
    with pytest.raises(ValueError, match=r"expected meta-parameters {'params': …, 'lr': …}, found"):
        meta.adapt(CASE.params, CASE.each()[0]["support"])
